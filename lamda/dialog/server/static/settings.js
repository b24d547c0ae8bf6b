// What the reader chose for all conversations, in localStorage. An empty field means the server's default.

import { find } from "./dom.js";

const NAME = "lamda-settings";
const FIELDS = ["temperature", "candidates", "seed"];

// Fill in the form with what is stored, as far as it is valid, and store what is changed.
export function openSettings(model) {
  const { candidates, max_candidates } = model.lamda ?? {};
  if (candidates) find("candidates").placeholder = candidates;
  if (max_candidates) find("candidates").max = max_candidates;
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch { /* not ours, or no storage: the defaults */ }
  for (const name of FIELDS) {
    const input = find(name);
    input.value = typeof stored[name] === "number" ? stored[name] : "";
    if (!input.checkValidity()) input.value = "";
    input.addEventListener("input", store);
  }
}

// Those that are set and valid.
export function settings() {
  const set = FIELDS.map(find).filter((input) => input.value !== "" && input.checkValidity());
  return Object.fromEntries(set.map((input) => [input.id, input.valueAsNumber]));
}

function store() {
  try {
    localStorage.setItem(NAME, JSON.stringify(settings()));
  } catch { /* no storage: they hold until the page is closed */ }
}

export function reset() {
  for (const name of FIELDS) find(name).value = "";
  store();
}
