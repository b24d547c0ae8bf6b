// Requests to the server.

const CHARACTERS = 250_000, MESSAGES = 1000, STRUCTURE = 40_000; // below the server's limits (docs/serving.md)
let key = ""; // in this page's memory only

export const useKey = (given) => { key = given; };

// Throws an Error with the HTTP status of a failed request.
async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

export async function findModel() {
  return (await (await request("/v1/models")).json()).data[0];
}

// The events of a streamed reply. A stream that ends early is an error: half a reply is not a reply.
export async function* reply(body, signal) {
  const response = await request("/v1/chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Error("the connection was lost before the reply was complete");
    });
    if (done) throw new Error("the connection ended before the reply was complete");
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// Old messages are left out before the body exceeds the server's limits: the model would not read them anyway. The
// system text stays.
export function bodyOf(messages, options) {
  const first = messages.filter((message) => message.role === "system");
  let said = messages.filter((message) => message.role !== "system");
  for (;;) {
    const body = JSON.stringify({
      ...options, messages: [...first, ...said], stream: true, stream_options: { include_progress: true },
    });
    const structure = body.match(/[,[{]/g).length;
    if (said.length <= 1 || (body.length < CHARACTERS && said.length < MESSAGES && structure < STRUCTURE)) return body;
    said = said.slice(Math.ceil(said.length / 10));
  }
}
