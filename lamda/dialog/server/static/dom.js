// Elements. Whoever wrote a text (user, model, server, storage), it enters the page here, as text and never as markup.

export const find = (id) => document.getElementById(id);

// Control characters are written out (ESC as \x1b), as `lamda chat` does: they hide text, or turn its direction around.
export function visible(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (character) => {
    if ("\n\t\u200c\u200d".includes(character)) return character;
    const code = character.codePointAt(0).toString(16);
    const [letter, digits] = code.length <= 2 ? ["x", 2] : code.length <= 4 ? ["u", 4] : ["U", 8];
    return `\\${letter}${code.padStart(digits, "0")}`;
  });
}

export function make(tag, className, content = []) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (typeof content === "string") element.textContent = visible(content);
  else element.append(...content);
  return element;
}

// A text whose direction is its own: it does not turn what stands around it.
export function textOf(text) {
  const element = make("div", "text", text);
  element.dir = "auto";
  return element;
}

// action: what a click on it does (chat.js). label: its accessible name, which begins with the text.
export function button(action, text, label = text) {
  const element = make("button", "quiet", text);
  element.type = "button";
  element.dataset.action = action;
  element.setAttribute("aria-label", label);
  return element;
}

export const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

// What is copied is what is seen: hidden characters could do harm where they are pasted.
// Without a secure context (http from another machine) there is no navigator.clipboard.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(visible(text));
  const area = make("textarea", "unseen");
  area.value = visible(text);
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  if (!isCopied) throw new Error("the browser does not allow it");
}
