// Why a reply is what it is: its candidates with their scores, the steps with tools, its sources.

import { count, make, textOf } from "./dom.js";

const ATTRIBUTES = ["sensible", "specific", "interesting", "unsafe"];

// The parts below a reply. place: makes the names of footnotes unique in the page.
export function reasonsBelow(reply, place) {
  const { candidates, steps, sources } = reply.reasons;
  const parts = notes(reply).map((note) => make("p", "note", note));
  if (sources.length) parts.push(sourcesOf(sources, steps, place));
  const queries = steps.filter((step) => step.to === "TS").length;
  if (steps.length) parts.push(fold(`Research: ${queries ? count(queries, "query", "queries") : "no query"}`, () => stepsOf(steps)));
  if (candidates.length) parts.push(fold(summaryOf(candidates), () => candidatesOf(candidates, reply)));
  return parts;
}

// Marks that lead to the sources.
export function marks(sources, place) {
  return sources.map((_, index) => {
    const link = make("a", "", String(index + 1));
    link.href = `#source-${place}-${index + 1}`;
    link.setAttribute("aria-label", `Source ${index + 1}`);
    return make("sup", "", [link]);
  });
}

function notes({ reasons, end }) {
  const { messages_left_out: left, system_cut: isSystemCut, last_message_cut: isCut } = reasons.context;
  const oldest = left === 1 ? "message" : `${left} messages`;
  return [
    reasons.refused && "The filter dropped every candidate. This is the text that is set for that case.",
    end === "length" && "Cut off at the length limit.",
    left > 0 && `The conversation is longer than what the model reads: it did not read the oldest ${oldest}.`,
    isSystemCut && "The system text is longer than what the model reads: it read only the beginning of it.",
    isCut && "The message is longer than what the model reads: it read only the end of it.",
  ].filter(Boolean);
}

function summaryOf(candidates) {
  const dropped = candidates.filter((candidate) => candidate.dropped !== null).length;
  return count(candidates.length, "candidate") + (dropped ? `, ${dropped} dropped` : "");
}

// The content is made when it is opened for the first time.
function fold(title, content) {
  const details = make("details", "", [make("summary", "", title)]);
  details.addEventListener("toggle", () => details.append(content()), { once: true });
  return details;
}

function candidatesOf(candidates, { seed, temperature }) {
  const items = candidates.map((candidate) => {
    const isDropped = candidate.dropped !== null;
    const likelihood = candidate.scores.log_likelihood ?? null;
    const place = [
      isDropped ? "Dropped" : `No. ${candidate.rank}`,
      `value ${digits(candidate.value, 3)}`,
      `log-likelihood ${digits(likelihood, 2)}`,
    ];
    const item = make("li", isDropped ? "dropped" : candidate.rank === 1 ? "chosen" : "", [
      make("div", "place", place.join(" · ")),
      textOf(candidate.text || "(empty)"),
      scoresOf(candidate.scores),
    ]);
    if (isDropped) item.firstChild.after(make("div", "reason", candidate.dropped));
    return item;
  });
  const used = [temperature !== null && `temperature ${temperature}`, seed !== null && `seed ${seed}`].filter(Boolean);
  const footer = make("p", "note", used.length ? `Sampled with ${used.join(", ")}.` : "");
  return make("div", "", [make("ol", "candidates", items), footer]);
}

function scoresOf(scores) {
  const rated = ATTRIBUTES.filter((name) => name in scores);
  return make("div", "scores", rated.map((name) => {
    const bar = make("meter", name === "unsafe" ? "bad" : "");
    bar.value = scores[name] ?? 0;
    bar.setAttribute("aria-label", `P(${name})`);
    return make("div", "score", [make("span", "", name), bar, make("span", "", digits(scores[name], 2))]);
  }));
}

const digits = (value, places) => (value === null ? "none" : value.toFixed(places));

function stepsOf(steps) {
  const items = steps.map((step) => {
    const isQuery = step.to === "TS";
    const item = make("li", "", [make("div", "place", isQuery ? "Query to the tools" : "Answer"), textOf(step.text)]);
    if (step.dropped !== null) {
      item.append(make("div", "reason", `Dropped: ${step.dropped}. The best candidate is the reply.`));
    }
    for (const { text, source } of step.results) {
      item.append(make("div", "result", [textOf(text), ...(source === null ? [] : [sourceOf(source)])]));
    }
    if (isQuery && !step.results.length) item.append(make("div", "result note", "No results"));
    return item;
  });
  return make("ol", "steps", items);
}

function sourcesOf(sources, steps, place) {
  const found = steps.flatMap((step) => step.results);
  const items = sources.map((source, index) => {
    const item = make("li", "", [sourceOf(source)]);
    item.id = `source-${place}-${index + 1}`;
    const quoted = found.find((result) => result.source === source)?.text;
    if (quoted) item.append(make("div", "quote", quoted.length > 200 ? `${quoted.slice(0, 200)}…` : quoted));
    return item;
  });
  const list = make("ol", "sources", items);
  list.setAttribute("aria-label", "Sources");
  return list;
}

// A link only for an address in the web, written as the browser will open it: a source is untrusted text.
function sourceOf(source) {
  let url;
  try {
    url = new URL(source);
  } catch { /* a file and its line */ }
  if (!["http:", "https:"].includes(url?.protocol)) return make("bdi", "source", source);
  const link = make("a", "source", url.href);
  link.href = url.href;
  link.target = "_blank";
  link.rel = "noopener noreferrer";
  return link;
}
