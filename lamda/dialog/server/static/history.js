// The dialog with the conversations that this browser keeps.

import { button, count, find, make } from "./dom.js";
import { newConversation } from "./records.js";
import * as store from "./store.js";

// current: the id of the conversation on the page. open: shows another. notify: reports a problem.
export async function openHistory({ current, open, notify }) {
  const dialog = find("history");
  const refresh = async () => {
    const conversations = await store.all();
    const items = conversations.map((each) => itemOf(each, { isCurrent: each.id === current, open, refresh }));
    find("conversations").replaceChildren(...(items.length ? items : [make("li", "note", "None yet.")]));
    find("clear").hidden = !items.length;
  };
  find("clear").onclick = async () => {
    if (!confirm("Delete all conversations that this browser keeps?")) return;
    await store.clear();
    dialog.close();
    open(newConversation());
  };
  try {
    await refresh();
    dialog.showModal();
  } catch (error) {
    notify(`This browser keeps no conversations (${error.message}).`);
  }
}

function itemOf(conversation, { isCurrent, open, refresh }) {
  const name = conversation.turns[0]?.user.slice(0, 80) || "(empty)";
  const when = new Date(conversation.changed).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const details = `${when} · ${count(conversation.turns.length, "turn")}`;
  const title = make("button", "title", [make("span", "name", name), make("span", "note", details)]);
  title.type = "button";
  if (isCurrent) title.setAttribute("aria-current", "true");
  title.addEventListener("click", async () => {
    find("history").close();
    const stored = await store.load(conversation.id).catch(() => null); // a stopped reply may have come since
    open(stored ?? conversation);
  });
  const remove = button("delete", "Delete", `Delete: ${name}`);
  remove.addEventListener("click", async () => {
    await store.remove(conversation.id);
    if (isCurrent) open(newConversation());
    await refresh();
    find("history").querySelector("li button, .close").focus();
  });
  return make("li", "", [title, remove]);
}
