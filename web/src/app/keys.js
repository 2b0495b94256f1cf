// The keyboard: each key of the list does one thing, everywhere but in text fields and open dialogs.

import { act, headSelector } from "./actions.js";
import { hovered, recording, selection } from "./store.js";

export const KEYS = [
  ["← →", "the word before, the word after"],
  ["Home End", "the first word, the last word"],
  ["↑ ↓", "one layer up, one layer down"],
  ["Shift ← →", "the head before, the head after"],
  ["Enter", "pin the word in front, or let it go"],
  ["Shift Enter", "pin all from the word in front to this one (or Shift and a click)"],
  ["Esc", "let all pins go"],
  ["/", "find a word"],
  ["m", "several heads at once; then a click on a head adds it"],
  ["r", "turn the question round: who looks at this word"],
  ["s", "words or subwords"],
  ["1 2 3 4 5", "sentence, heads, map, effects, compare"],
  ["?", "this list"],
];

export function onKey(event, { find, help }) {
  if (!recording.value || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
  const where = event.target.closest?.("input, textarea, select, dialog, .menu");
  if (where && !(event.key === "Escape" && where.matches("input[readonly]"))) return;
  if (event.target.matches?.(".sheet, .table, .plane") && /^(Arrow|Home|End)/.test(event.key)) return; // these scroll
  const s = selection.value;
  const inGrid = Boolean(event.target.closest?.("button.head"));
  const headStep = (layers, heads) => {
    act({ type: "moveHead", layers, heads });
    if (inGrid) requestAnimationFrame(() => document.querySelector(headSelector(selection.value.layer, selection.value.head))?.focus());
  };
  const keys = {
    ArrowLeft: () => (event.shiftKey || inGrid ? headStep(0, -1) : act({ type: "moveWord", step: -1 })),
    ArrowRight: () => (event.shiftKey || inGrid ? headStep(0, 1) : act({ type: "moveWord", step: 1 })),
    ArrowUp: () => headStep(-1, 0),
    ArrowDown: () => headStep(1, 0),
    Home: () => act({ type: "moveWord", step: -1e9 }),
    End: () => act({ type: "moveWord", step: 1e9 }),
    Escape: () => act({ type: "escape" }),
    "/": find,
    m: () => act({ type: "several" }),
    r: () => act({ type: "mode", mode: s.mode === "to" ? "from" : "to" }),
    s: () => act({ type: "unit", unit: s.unit === "word" ? "token" : "word" }),
    1: () => act({ type: "view", view: "sentence" }),
    2: () => act({ type: "view", view: "heads" }),
    3: () => act({ type: "view", view: "map" }),
    4: () => act({ type: "view", view: "effects" }),
    5: () => act({ type: "view", view: "compare" }),
    "?": help,
  };
  const does = keys[event.key] ?? keys[event.key.toLowerCase?.()];
  if (!does) {
    if (event.key === "Enter" && event.target === document.body && s.word !== null) {
      event.preventDefault();
      act({ type: "pin", side: s.side, word: s.word });
    }
    return;
  }
  event.preventDefault();
  hovered.value = null;
  does();
}
