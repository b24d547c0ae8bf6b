// A turn on the page: the user's message, and the reply or what is known of it.

import { button, count, make, textOf } from "./dom.js";
import { marks, reasonsBelow } from "./reasons.js";

// pending: null, or the state of its running request: {text, progress}.
export function turnElement(turn, index, { pending, isTuned }) {
  const buttons = [button("edit", "Edit", "Edit message"), button("copy-user", "Copy", "Copy message")];
  const said = make("div", "user", [textOf(turn.user), make("div", "actions", buttons)]);
  const parts = [said];
  if (pending) parts.push(pendingOf(pending, isTuned));
  else if (turn.replies.length) parts.push(replyOf(turn, index));
  if (!pending && (turn.problem || !turn.replies.length)) parts.push(problemOf(turn));
  const element = make("article", "turn", parts);
  element.dataset.index = index;
  element.setAttribute("aria-label", `Turn ${index + 1}`);
  return element;
}

// Only the last reply can be another one: later ones rest on those before them, whose buttons chat.css hides.
function replyOf(turn, index) {
  const reply = turn.replies[turn.shown];
  const body = textOf(reply.text);
  const place = `${index + 1}-${turn.shown + 1}`;
  if (reply.reasons) body.append(...marks(reply.reasons.sources, place));
  const actions = [button("copy", "Copy", "Copy reply"), button("again", "Regenerate", "Regenerate reply")];
  if (turn.replies.length > 1) actions.push(versionsOf(turn));
  const element = make("div", "assistant", [body, make("div", "actions", actions)]);
  if (reply.end === "stopped") element.append(make("p", "note", "Stopped. The model will read it as it is."));
  if (reply.reasons) element.append(...reasonsBelow(reply, place));
  return element;
}

function versionsOf({ shown, replies }) {
  const parts = [make("span", "note", `${shown + 1} of ${replies.length}`)];
  if (shown > 0) parts.unshift(button("back", "‹", "Previous version"));
  if (shown < replies.length - 1) parts.push(button("forth", "›", "Next version"));
  return make("span", "versions", parts);
}

function problemOf(turn) {
  const parts = [make("p", "reason", turn.problem || "No reply came.")];
  if (!turn.replies.length) {
    parts.push(make("p", "note", "The model does not read this message again."));
    parts.push(make("div", "actions", [button("again", "Try again")]));
  }
  return make("div", "problem", parts);
}

function pendingOf({ text, progress }, isTuned) {
  const element = make("div", "assistant pending", [textOf(text)]);
  if (!text) {
    element.firstChild.hidden = true;
    element.append(progressOf(progress, isTuned));
  }
  return element;
}

// What the server is doing: with more than one candidate, or a filter, no text may be shown before all are finished.
export function progressOf(progress, isTuned) {
  const { stage, candidates = 0, finished = 0, tokens = 0 } = progress ?? {};
  const parts = [];
  if (stage === "sampling" && candidates > 1) {
    const bar = make("progress");
    Object.assign(bar, { max: candidates, value: finished });
    bar.setAttribute("aria-label", "Finished candidates");
    const end = isTuned ? "The best appears when all are rated." : "The likeliest appears when all are finished.";
    const counts = `${finished} of ${candidates} candidates finished, ${count(tokens, "token")}`;
    parts.push(bar, make("p", "note", counts), make("p", "note", end));
  } else {
    const rated = `Rating ${count(candidates, "candidate")}…`;
    const sampled = `Writing: ${count(tokens, "token")}. The reply appears when it is rated.`;
    const words = { sampling: sampled, rating: rated, tools: `Using the tools: ${count(tokens, "token")}…` };
    parts.push(make("p", "note pulse", words[stage] ?? "Reading the conversation…"));
  }
  return make("div", "progress", parts);
}

// The form in place of a message that is edited. later: the number of turns after it.
export function editor(turn, later) {
  const area = make("textarea");
  area.value = turn.user;
  area.setAttribute("aria-label", "Edited message");
  const send = make("button", "", "Send");
  const form = make("form", "editor", [area]);
  const gone = later === 1 ? "turn" : `${later} turns`;
  if (later) form.append(make("p", "note", `Sending it removes the ${gone} below.`));
  form.append(make("div", "actions", [button("cancel", "Cancel", "Cancel editing"), send]));
  return form;
}

export const systemElement = (text) => make("p", "note system", `System text: ${text}`);

export function emptyElement(model) {
  const { is_tuned: isTuned, candidates = 1, threshold = 1, tools = [] } = model.lamda ?? {};
  const filter = threshold < 1 ? "a filter drops those that it finds unsafe" : "no filter drops unsafe ones";
  const rated = `Each reply is the best of ${count(candidates, "candidate")}: the model rates them itself; ${filter}.`;
  const continued = "This model was only pre-trained: it continues lines of text, and no filter sees them.";
  const parts = [make("h2", "", `Talk with ${model.id}`), make("p", "note", isTuned ? rated : continued)];
  if (tools.length) parts.push(make("p", "note", `It may use tools: ${tools.join(", ")}.`));
  const keys = "Enter sends, Shift+Enter breaks a line, Escape stops. Settings lists more keys.";
  return make("div", "empty", [...parts, make("p", "note keyboard", keys)]);
}
