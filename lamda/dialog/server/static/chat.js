// The page of `lamda serve`: one conversation, its turns, and the request that runs.

import { bodyOf, findModel, reply as streamed, useKey } from "./client.js";
import { copy, find, visible } from "./dom.js";
import { openHistory } from "./history.js";
import { messagesFor, newConversation, reasonsOf } from "./records.js";
import { openSettings, reset, settings } from "./settings.js";
import * as store from "./store.js";
import { editor, emptyElement, progressOf, systemElement, turnElement } from "./turns.js";

const [talk, form, input, sendButton, stopButton, keyForm, keyInput, systemInput] =
  ["talk", "form", "input", "send", "stop", "key-form", "key", "system"].map(find);

let model = null;                       // as /v1/models describes it
let conversation = newConversation();
let running = null;                     // {index, text, progress, controller} of the request

// --- What is shown

const isTuned = () => model?.lamda?.is_tuned ?? true;

function show() {
  talk.replaceChildren();
  if (model && !conversation.turns.length) talk.append(emptyElement(model));
  conversation.turns.forEach((_, index) => showTurn(index));
  showSystem();
  showBusy();
}

// A turn as it is now. The others stay as they are, with what is unfolded in them.
function showTurn(index) {
  const pending = running?.index === index ? running : null;
  const element = turnElement(conversation.turns[index], index, { pending, isTuned: isTuned() });
  const before = elementAt(index);
  if (before) before.replaceWith(element);
  else talk.append(element);
  for (const gone of talk.querySelectorAll(".empty, .turn")) {
    if (!(gone.dataset.index <= last())) gone.remove();
  }
}

function showSystem() {
  talk.querySelector(".system")?.remove();
  if (conversation.system) talk.prepend(systemElement(conversation.system));
}

function showBusy() {
  sendButton.hidden = running !== null;
  stopButton.hidden = running === null;
  talk.setAttribute("aria-busy", running !== null);
  for (const each of talk.querySelectorAll("button:not([data-action^=copy])")) each.disabled = running !== null;
}

const last = () => conversation.turns.length - 1;
const elementAt = (index) => talk.querySelector(`[data-index="${index}"]`);

// Keep the end in view for a reader who is there.
function following(change) {
  const page = document.documentElement;
  const isAtEnd = page.scrollHeight - page.clientHeight - page.scrollTop < 60;
  change();
  if (isAtEnd) page.scrollTop = page.scrollHeight;
}

function notify(text) {
  find("notice").textContent = text;
  find("notice").hidden = !text;
}

const announce = (text) => { find("status").textContent = text; };

// A phone's keyboard would cover the page.
function focusInput() {
  if (matchMedia("(hover: hover)").matches) input.focus();
}

// --- The conversation

async function keep() {
  const kept = conversation;
  kept.changed = Date.now();
  try {
    await store.save(kept);
    if (conversation === kept) history.replaceState(null, "", `?c=${kept.id}`);
  } catch (error) {
    notify(`This browser cannot keep the conversation (${error.message}). It ends with the page.`);
  }
}

function open(next) {
  running?.controller.abort();
  running = null;
  conversation = next;
  systemInput.value = next.system;
  history.replaceState(null, "", next.turns.length ? `?c=${next.id}` : location.pathname);
  notify("");
  show();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  focusInput();
}

function say(text) {
  conversation.turns.push({ user: text, replies: [], shown: -1, problem: "" });
  answer(conversation.turns.length - 1);
}

// Ask for a reply to a turn; another one if it has some.
async function answer(index) {
  const asked = conversation, turn = asked.turns[index];
  const { seed = crypto.getRandomValues(new Uint32Array(1))[0], ...options } = settings();
  const used = { ...options, seed: seed + turn.replies.length };
  running = { index, text: "", progress: null, controller: new AbortController() };
  const request = running;
  turn.problem = "";
  const reply = { text: "", end: "stop", seed: used.seed, temperature: used.temperature ?? null, reasons: null };
  showTurn(index);
  showBusy();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  announce("Waiting for the reply.");
  keep();
  try {
    const body = bodyOf(messagesFor(asked, index), { model: model.id, ...used });
    for await (const event of streamed(body, request.controller.signal)) {
      const choice = event.choices?.[0];
      reply.text += choice?.delta?.content ?? "";
      reply.end = choice?.finish_reason ?? reply.end;
      if (event.lamda) reply.reasons = reasonsOf(event.lamda);
      Object.assign(request, { text: reply.text, progress: event.progress ?? request.progress });
      if (conversation === asked) following(() => showProgress(request));
    }
  } catch (error) {
    reply.end = "stopped";
    turn.problem = error.name === "AbortError" ? (reply.text ? "" : "Stopped.") : sentence(error.message);
    if (error.status === 401) askForKey();
  }
  if (reply.text || reply.end !== "stopped") turn.shown = turn.replies.push(reply) - 1;
  if (running === request) running = null;
  await finish(asked, index);
}

async function finish(asked, index) {
  if (conversation === asked) {
    const turn = asked.turns[index];
    following(() => showTurn(index));
    showBusy();
    announce(turn.problem || `Reply: ${turn.replies[turn.shown].text}`);
    if (document.activeElement === document.body) focusInput();
    await keep();
  } else if (await store.load(asked.id).catch(() => null)) { // another is open, and this one was not deleted
    await store.save(asked);
    if (conversation.id === asked.id && !running) open(asked); // it was opened again before this was stored
  }
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1).replace(/\.$/, "")}.`;

// Only what changes, so that a selection in the text stays.
function showProgress({ index, text, progress }) {
  const element = elementAt(index)?.querySelector(".pending");
  if (!element) return;
  element.firstChild.hidden = !text;
  element.firstChild.textContent = visible(text);
  const shown = element.querySelector(".progress");
  if (text) shown?.remove();
  else shown?.replaceWith(progressOf(progress, isTuned()));
}

// --- What a click or a key does

const actions = {
  copy: (turn, clicked) => copied(turn.replies[turn.shown].text, clicked),
  "copy-user": (turn, clicked) => copied(turn.user, clicked),
  again: (turn, _, index) => answer(index),
  back: (turn, _, index) => version(turn, index, -1),
  forth: (turn, _, index) => version(turn, index, 1),
  edit: (turn, _, index) => edit(turn, index),
  cancel: (turn, _, index) => {
    showTurn(index);
    elementAt(index).querySelector("[data-action=edit]").focus();
  },
};

async function copied(text, clicked) {
  try {
    await copy(text);
    clicked.textContent = "Copied";
    announce("Copied.");
  } catch (error) {
    notify(`Nothing was copied: ${error.message}.`);
  }
  setTimeout(() => { clicked.textContent = "Copy"; }, 1500);
}

function version(turn, index, step) {
  turn.shown += step;
  showTurn(index);
  const buttons = [step < 0 ? "back" : "forth", step < 0 ? "forth" : "back"];
  elementAt(index).querySelector(`[data-action=${buttons[0]}], [data-action=${buttons[1]}]`)?.focus();
  keep();
}

function edit(turn, index) {
  const place = editor(turn, conversation.turns.length - index - 1);
  elementAt(index).querySelector(".user, .editor").replaceWith(place);
  const area = place.querySelector("textarea");
  fit(area);
  area.focus();
  place.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = area.value.trim();
    if (!text || running) return;
    conversation.turns.length = index;
    say(text);
    focusInput();
  });
}

talk.addEventListener("click", ({ target }) => {
  const clicked = target.closest("button[data-action]");
  const index = Number(clicked?.closest(".turn").dataset.index);
  if (clicked) actions[clicked.dataset.action](conversation.turns[index], clicked, index);
});

function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

document.addEventListener("input", ({ target }) => {
  if (target.tagName === "TEXTAREA") fit(target);
});

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text || running || !model) return;
  input.value = "";
  fit(input);
  notify("");
  say(text);
});

const shortcuts = {
  KeyN: () => open(newConversation(conversation.system)),
  KeyR: () => { if (!running && last() >= 0) answer(last()); },
  KeyW: () => elementAt(last())?.querySelector("details:last-of-type > summary")?.click(),
  KeyH: () => openHistory({ current: conversation.id, open, notify }),
  KeyS: () => find("settings").showModal(),
};

document.addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  if (event.altKey && !event.ctrlKey && !event.metaKey && model && shortcuts[event.code]) {
    event.preventDefault();
    shortcuts[event.code]();
  } else if (key === "Enter" && !event.shiftKey && target.tagName === "TEXTAREA") {
    event.preventDefault();
    target.form.requestSubmit();
  } else if (key === "Escape") {
    const cancel = target.closest(".editor")?.querySelector("[data-action=cancel]");
    if (cancel) cancel.click();
    else running?.controller.abort();
  } else if (key === "ArrowUp" && target === input && !input.value && last() >= 0 && !running) {
    event.preventDefault();
    edit(conversation.turns[last()], last());
  }
});

stopButton.addEventListener("click", () => running?.controller.abort());
find("new").addEventListener("click", shortcuts.KeyN);
find("open-settings").addEventListener("click", shortcuts.KeyS);
find("open-history").addEventListener("click", shortcuts.KeyH);
for (const close of document.querySelectorAll("dialog .close")) {
  close.addEventListener("click", () => close.closest("dialog").close());
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", ({ target }) => { if (target === dialog) dialog.close(); }); // beside it
}
find("defaults").addEventListener("click", reset);
systemInput.addEventListener("input", () => { conversation.system = systemInput.value.trim(); });
find("settings").addEventListener("close", () => {
  showSystem();
  if (conversation.turns.length) keep();
});

// Another tab may have continued this conversation.
document.addEventListener("visibilitychange", async () => {
  if (document.hidden || running) return;
  const stored = await store.load(conversation.id).catch(() => null);
  if (stored && !running && stored.id === conversation.id && stored.changed > conversation.changed) open(stored);
});

// --- The start

function askForKey() {
  form.hidden = true;
  keyForm.hidden = false;
  keyInput.focus();
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(keyInput.value);
  keyInput.value = "";
  start();
});

async function start() {
  try {
    model = await findModel();
  } catch (error) {
    if (error.status === 401) askForKey();
    else notify(sentence(error.message));
    return;
  }
  find("model").textContent = model.id;
  keyForm.hidden = true;
  form.hidden = false;
  const { threshold = 1, tools = [] } = model.lamda ?? {};
  find("candidates-help").textContent = isTuned() && (threshold < 1 || tools.length)
    ? "A reply appears when all of them are rated."
    : "With 1, a reply appears as it is written; else when all are finished.";
  openSettings(model);
  if (conversation.turns.length) {  // the key was asked for again
    show();
    return;
  }
  const stored = await store.load(new URLSearchParams(location.search).get("c") ?? "").catch(() => null);
  open(stored ?? conversation);
}

start();
