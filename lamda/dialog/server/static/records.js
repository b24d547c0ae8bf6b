// Conversations as they are stored, and replies' reasons as the server sends them: each is read field by field, so that
// nothing of another shape or type comes further than this file.
//
//   conversation: {id, changed, system, turns: [{user, shown, problem, replies: [reply]}]}, shown: the reply's index
//   reply:        {text, end, seed, temperature, reasons}, end: its finish_reason, or "stopped"

const text = (value, fallback = "") => (typeof value === "string" ? value : fallback);
const number = (value) => (Number.isFinite(value) ? value : null);
const list = (value, read) => (Array.isArray(value) ? value.map(read).filter((item) => item !== null) : []);
const object = (value) => (value !== null && typeof value === "object" ? value : {});

export function newConversation(system = "") {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, changed: Date.now(), system, turns: [] };
}

// Null for what is not a conversation.
export function conversationOf(record) {
  const { id, changed, system, turns } = object(record);
  if (typeof id !== "string" || !/^[0-9a-f]{16}$/.test(id) || !Array.isArray(turns)) return null;
  return { id, changed: number(changed) ?? 0, system: text(system), turns: list(turns, turnOf) };
}

function turnOf(record) {
  const { user, replies, shown, problem } = object(record);
  if (typeof user !== "string") return null;
  const kept = list(replies, replyOf);
  const last = kept.length - 1;
  const isPlace = Number.isInteger(shown) && shown >= 0 && shown <= last;
  return { user, replies: kept, shown: isPlace ? shown : last, problem: text(problem) };
}

function replyOf(record) {
  const { text: said, end, seed, temperature, reasons } = object(record);
  if (typeof said !== "string") return null;
  return {
    text: said, end: text(end, "stop"), seed: number(seed), temperature: number(temperature),
    reasons: reasons ? reasonsOf(reasons) : null,
  };
}

// The field `lamda` of a reply.
export function reasonsOf(record) {
  const { candidates, steps, sources, refused, context } = object(record);
  const { messages_left_out, system_cut, last_message_cut } = object(context);
  return {
    candidates: list(candidates, (candidate) => {
      const { text: said, value, rank, dropped, scores } = object(candidate);
      const pairs = Object.entries(object(scores)).map(([name, score]) => [name, number(score)]);
      return {
        text: text(said), value: number(value), rank: number(rank), dropped: text(dropped, null),
        scores: Object.fromEntries(pairs),
      };
    }),
    steps: list(steps, (step) => {
      const { to, text: said, results, dropped } = object(step);
      const found = list(results, (result) => {
        const { text: snippet, source } = object(result);
        return { text: text(snippet), source: text(source, null) };
      });
      return { to: text(to), text: text(said), results: found, dropped: text(dropped, null) };
    }),
    sources: list(sources, (source) => text(source, null)),
    refused: refused === true,
    context: {
      messages_left_out: number(messages_left_out) ?? 0,
      system_cut: system_cut === true,
      last_message_cut: last_message_cut === true,
    },
  };
}

// What the model shall read to answer turn `index`: the turns before it that have a reply, and its message.
export function messagesFor(conversation, index) {
  const messages = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  for (const turn of conversation.turns.slice(0, index)) {
    const reply = turn.replies[turn.shown];
    if (reply?.text) messages.push({ role: "user", content: turn.user }, { role: "assistant", content: reply.text });
  }
  return [...messages, { role: "user", content: conversation.turns[index].user }];
}
