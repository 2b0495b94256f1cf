// The one store: recording, selection, hover. Everything on the page is drawn from it; every hand goes through `commit`.

import { computed, signal } from "@preact/signals";
import { createRecording } from "../core/recording.js";
import { fromHash, initialSelection, toHash } from "../core/selection.js";
import { createLoader } from "./load.js";
import { createTiles } from "./tiles.js";

export const status = signal({ kind: "loading" }); // loading | ready | failed {title, text, fix}
export const run = signal({ kind: "idle" }); // idle | running | failed {title, text, fix}
export const recording = signal(null);
export const selection = signal(null);
export const hovered = signal(null); // {side, word}
export const cell = signal(null); // {row, col} under the pointer on the map
export const arrived = signal(0); // grows with every blob that came: views read it to be drawn again
export const theme = signal("light");
export const notice = signal(""); // one short line that passes, such as "copied"
export const tilesArrived = signal(0);
let loader = null;
let mapTiles = null;
export const tiles = () => mapTiles;
export const heldKeys = () => [...loader.keys(), ...mapTiles.keys()];

export const hover = computed(() => {
  const [h, s] = [hovered.value, selection.value];
  return h && s && !(h.side === s.side && h.word === s.word) ? h : null;
});

export function open(payload) {
  loader = createLoader(payload, () => arrived.value++);
  const next = createRecording(payload, loader.get);
  mapTiles = createTiles(next, loader.raw, () => tilesArrived.value++);
  const before = selection.value;
  let start = fromHash(before ? "" : location.hash || payload.view || "", next);
  if (before) {
    // a new sentence in the same model: heads, view and unit stay as they were
    const kept = { ...before, word: start.word, side: start.side, target: null, pins: [], origin: before.origin, first: 0, camera: null };
    start = next.attention(before.attention)?.layers.includes(before.layer) ? fromHash(toHash({ ...kept }), next) : initialSelection(payload);
  }
  hovered.value = cell.value = null;
  recording.value = next;
  selection.value = start;
  status.value = { kind: "ready" };
  document.title = `regard: ${payload.text.slice(0, 60)}`;
  write(before ? "push" : "replace");
  prefetch(payload);
}

// Small recordings come whole, so that moving between heads never waits.
function prefetch(payload) {
  payload.attentions.forEach((attention, index) => {
    if (attention.long || !recording.value.small(index)) return;
    for (const layer of attention.layers) loader.get(`weights/${index}/${layer}`);
  });
}

export const rawBlob = (key) => loader.raw(key);

function write(how) {
  const hash = toHash(selection.value);
  try {
    if (how === "push" && hash !== location.hash) history.pushState(null, "", hash);
    else history.replaceState(null, "", hash);
  } catch {
    /* a page without an address (srcdoc) keeps its state to itself */
  }
}

let last = { kind: "", time: 0 };

// kind names the sort of change: a quick run of the same sort is one step of Back.
export function commit(next, kind) {
  if (next === selection.value) return;
  const now = performance.now();
  const follows = kind.startsWith("move") && last.kind === kind && now - last.time < 900;
  last = { kind, time: now };
  selection.value = next;
  write(follows ? "replace" : "push");
}

export function followAddress() {
  if (!recording.value) return;
  hovered.value = null;
  last = { kind: "", time: 0 };
  selection.value = fromHash(location.hash || recording.value.payload.view || "", recording.value);
}
