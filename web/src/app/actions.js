// What hands can do: buttons and keys end here, each as one change of the selection.

import * as S from "../core/selection.js";
import { cell, commit, hovered, notice, recording, run, selection, open } from "./store.js";

let focusAfter = null; // selector of what gets the focus once the page is drawn
export const takeFocus = () => {
  const selector = focusAfter;
  focusAfter = null;
  return selector;
};

export const wordSelector = (side, word) => `button.word[data-side="${side}"][data-word="${word}"]`;
export const headSelector = (layer, head) => `button.head[data-layer="${layer}"][data-head="${head}"]`;

export function act(action, event) {
  const s = selection.value;
  const r = recording.value;
  switch (action.type) {
    case "pin":
      return commit(event?.shiftKey ? S.pinSpan(s, action.side, action.word) : S.togglePin(s, action.side, action.word), "pin");
    case "focus":
      return commit(S.focusWord(s, action.side, action.word), "move word");
    case "target":
      return commit({ ...s, target: action.unit }, "target");
    case "pair":
      focusAfter = wordSelector(action.side, action.word);
      return commit({ ...S.focusWord({ ...s, mode: "to" }, action.side, action.word), target: action.unit }, "pair");
    case "origin":
      return commit({ ...s, origin: !s.origin }, "origin");
    case "head":
      return commit(S.chooseHead(s, action.layer, action.head), "head");
    case "moveHead":
      return commit(S.moveHead(s, r, action.layers, action.heads), "move head");
    case "moveWord": {
      const next = S.moveWord(s, r, action.step);
      focusAfter = next.word === null ? null : wordSelector(next.side, next.word);
      return commit(next, "move word");
    }
    case "goWord":
      focusAfter = action.keep ? null : wordSelector(action.side, action.word);
      return commit(S.focusWord(s, action.side, action.word), "move word");
    case "escape":
      if (s.pins.length) return commit(S.unpin(s), "unpin");
      return commit(s.word === null ? s : { ...s, word: null, target: null }, "unpin");
    case "mode":
      return commit({ ...s, mode: action.mode, target: null }, "mode");
    case "unit":
      return commit(S.setUnit(s, r, action.unit), "unit");
    case "several":
      return commit(S.toggleSeveral(s), "several");
    case "view":
      return commit({ ...s, view: action.view }, "view");
    case "set":
      return commit({ ...s, ...action.change }, "set");
    case "sort":
      return commit({ ...s, sort: action.sort }, "sort");
    case "page":
      return commit({ ...s, first: action.first }, "move page");
    case "attention":
      return commit(S.setAttention(s, r, action.index), "attention");
  }
}

export function pickCell(at, chosen) {
  if (!chosen) return void (cell.value = at);
  if (!at) return;
  const s = selection.value;
  const side = recording.value.attention(s.attention).query_side;
  hovered.value = null;
  const pinned = S.isPinned(s, side, at.row) ? S.focusWord(s, side, at.row) : S.togglePin(s, side, at.row);
  commit({ ...pinned, mode: "to", target: at.col }, "pin");
}

export function focusWord(data) {
  hovered.value = null;
  act({ type: "focus", ...data });
}

let passing = null;
export function say(text) {
  notice.value = text;
  clearTimeout(passing);
  passing = setTimeout(() => (notice.value = ""), 4000);
}

// A new sentence through the model again.
export function runAgain(text) {
  if (text.trim()) return ask("run", { text });
  run.value = { kind: "failed", title: "Nothing to read.", text: "Type a sentence, then press Enter." };
}

// One of two sentences that differ at the end: opened on the word that asks, its twin kept for comparing.
export async function readTwin(text, other) {
  await ask("run", { text });
  const r = recording.value;
  const s = selection.value;
  if (run.value.kind !== "idle" || r.payload.text !== text) return;
  const word = r.units(s.side, s.unit).findIndex((unit) => unit.text.trim() === "it");
  commit({ ...(word < 0 ? s : S.focusWord({ ...s, mode: "to" }, s.side, word)), other }, "twin");
}

// Another text of this recording.
export const openWindow = (index) => ask("window", { index });

async function ask(where, what) {
  run.value = { kind: "running" };
  try {
    const reply = await fetch(`api/${where}`, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(what) });
    const answer = await reply.json();
    if (!reply.ok || answer.error) {
      const title = reply.status === 413 || /too long|at most|longer than/i.test(answer.error ?? "") ? "Too long." : "The model could not read this.";
      run.value = { kind: "failed", title, text: answer.error ?? `The server answered ${reply.status}.` };
      return;
    }
    run.value = { kind: "idle" };
    open(answer);
  } catch {
    run.value = { kind: "failed", title: "No answer.", text: "The server is not running any more. Start it again with regard look, then reload this page." };
  }
}
