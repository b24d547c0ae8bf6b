// The page of `lamda serve`. Text of users and of the model is set through textContent only.
"use strict";

const ATTRIBUTES = ["sensible", "specific", "interesting", "unsafe"];
const find = (id) => document.getElementById(id);
const [talk, form, input, sendButton, stopButton, keyForm, keyInput] =
  ["talk", "form", "input", "send", "stop", "key-form", "key"].map(find);

let model = null;      // the model's name
let key = "";          // in this page's memory only
let messages = [];     // the conversation as sent to the server
let running = null;    // AbortController of the active request

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function addMessage(kind, text) {
  const message = make("article", `message ${kind}`);
  message.append(make("div", "text", text));
  talk.append(message);
  talk.scrollTop = talk.scrollHeight;
  return message;
}

// Throws an Error with the HTTP status of a failed request.
async function request(path, options = {}) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const error = new Error(body?.error?.message ?? `the server answered ${response.status}`);
  error.status = response.status;
  throw error;
}

async function findModel() {
  try {
    model = (await (await request("/v1/models")).json()).data[0].id;
    find("model").textContent = model;
    keyForm.hidden = true;
    form.hidden = false;
    input.focus();
  } catch (error) {
    if (error.status === 401) {
      form.hidden = true;
      keyForm.hidden = false;
      keyInput.focus();
    } else {
      addMessage("error", String(error.message));
    }
  }
}

// The JSON objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
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

// Drop old turns before the body exceeds the server's limit: the model would not read them anyway.
function bodyOf(said) {
  for (;;) {
    const body = JSON.stringify({ model, messages: said, stream: true });
    if (said.length <= 1 || (body.length < 250000 && said.length < 1000)) return body;
    said = said.slice(Math.ceil(said.length / 10));
  }
}

async function answer(text) {
  const said = [...messages, { role: "user", content: text }];
  const asked = addMessage("user", text);
  const reply = addMessage("assistant waiting", "…");
  running = new AbortController();
  setBusy(true);
  try {
    const body = bodyOf(said);
    const response = await request("/v1/chat/completions", { method: "POST", body, signal: running.signal });
    let spoken = "", reasons = null;
    for await (const event of events(response)) {
      spoken += event.choices[0]?.delta?.content ?? "";
      reasons = event.lamda ?? reasons;
      if (spoken) {
        reply.classList.remove("waiting");
        reply.firstChild.textContent = spoken;
      }
    }
    reply.classList.remove("waiting");
    reply.firstChild.textContent = spoken;
    if (reasons) explain(reply, reasons);
    messages = [...said, { role: "assistant", content: spoken }];
  } catch (error) {
    reply.remove();
    asked.remove();
    const stopped = error.name === "AbortError";
    addMessage(stopped ? "note" : "error", stopped ? "Stopped; nothing was kept of that turn." : String(error.message));
    if (!input.value) input.value = text;
    if (error.status === 401) findModel();
  } finally {
    running = null;
    setBusy(false);
    talk.scrollTop = talk.scrollHeight;
    input.focus();
  }
}

function explain(reply, reasons) {
  if (reasons.refused) reply.append(make("div", "note", "The filter dropped every candidate; this is the configured refusal."));
  if (reasons.sources.length) {
    const list = make("ul", "sources");
    for (const source of reasons.sources) {
      const item = make("li");
      item.append(sourceOf(source));
      list.append(item);
    }
    reply.append(make("div", "note", "Sources"), list);
  }
  if (reasons.steps.length) reply.append(fold(`Research: ${count(reasons.steps.filter((step) => step.to === "TS").length, "query", "queries")}`, stepsOf(reasons.steps)));
  const dropped = reasons.candidates.filter((candidate) => candidate.dropped !== null).length;
  reply.append(fold(`${count(reasons.candidates.length, "candidate", "candidates")}, ${dropped} dropped`, candidatesOf(reasons.candidates)));
}

const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;

function fold(title, content) {
  const details = make("details");
  details.append(make("summary", "", title), content);
  return details;
}

function candidatesOf(candidates) {
  const list = make("ol", "candidates");
  for (const candidate of candidates) {
    const kind = candidate.dropped !== null ? "dropped" : candidate.rank === 1 ? "chosen" : "";
    const item = make("li", kind);
    const place = candidate.rank === null ? "dropped" : `#${candidate.rank}`;
    item.append(make("div", "place", `${place} · ranking value ${candidate.value.toFixed(3)}`));
    if (candidate.dropped !== null) item.append(make("div", "reason", candidate.dropped));
    item.append(make("div", "text", candidate.text), scoresOf(candidate.scores));
    list.append(item);
  }
  return list;
}

function scoresOf(scores) {
  const grid = make("div", "scores");
  for (const [name, value] of Object.entries(scores)) {
    const row = make("div", "score");
    const digits = make("span", "", value.toFixed(2));
    if (ATTRIBUTES.includes(name)) {
      const bar = make("meter");
      bar.value = value;
      if (name === "unsafe") Object.assign(bar, { high: 0.5, low: 0.5, optimum: 0 });  // the fuller, the worse
      bar.setAttribute("aria-label", `P(${name})`);
      row.append(make("span", "", name), bar, digits);
    } else {
      row.append(make("span", "", "log-lik."), make("span"), digits);
      row.title = "mean log-likelihood of a token";
    }
    grid.append(row);
  }
  return grid;
}

function stepsOf(steps) {
  const list = make("ol", "steps");
  for (const step of steps) {
    const item = make("li");
    item.append(make("div", "place", step.to === "TS" ? "query to the toolset" : "response to the user"), make("div", "text", step.text));
    if (step.dropped) item.append(make("div", "reason", `dropped: ${step.dropped}; the base answer is the reply`));
    for (const result of step.results) {
      const found = make("div", "result");
      found.append(make("div", "text", result.text));
      if (result.source) found.append(sourceOf(result.source));
      item.append(found);
    }
    if (step.to === "TS" && !step.results.length) item.append(make("div", "result note", "no results"));
    list.append(item);
  }
  return list;
}

// A link only for web URLs: a source is untrusted text.
function sourceOf(source) {
  if (!/^https?:\/\//i.test(source)) return make("span", "source", source);
  const link = make("a", "source", source);
  link.href = source;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}

function setBusy(isBusy) {
  sendButton.disabled = isBusy;
  stopButton.hidden = !isBusy;
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running || !model) return;
  input.value = "";
  fitInput();
  answer(text);
});
input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
stopButton.addEventListener("click", () => running?.abort());
find("reset").addEventListener("click", () => {
  running?.abort();
  messages = [];
  talk.replaceChildren();
  input.focus();
});
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  key = keyInput.value;
  keyInput.value = "";
  findModel();
});
findModel();
