// The conversations of this browser, in IndexedDB; the server keeps none.

import { conversationOf } from "./records.js";

const database = new Promise((resolve, reject) => {
  const opening = indexedDB.open("lamda", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
  opening.onsuccess = () => resolve(opening.result);
  opening.onerror = () => reject(opening.error);
});
database.catch(() => {}); // each of the calls below reports it

async function within(mode, work) {
  const transaction = (await database).transaction("conversations", mode);
  const asked = work(transaction.objectStore("conversations"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

export const save = (conversation) => within("readwrite", (store) => store.put(conversation));
export const remove = (id) => within("readwrite", (store) => store.delete(id));
export const clear = () => within("readwrite", (store) => store.clear());
export const load = async (id) => conversationOf(await within("readonly", (store) => store.get(id)));

// The last changed first.
export async function all() {
  const records = await within("readonly", (store) => store.getAll());
  return records.map(conversationOf).filter((each) => each !== null).sort((one, other) => other.changed - one.changed);
}
