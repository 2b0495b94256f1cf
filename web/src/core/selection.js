// The one selection that drives every view: pure transitions, and its form in the address.
//
// attention, layer, head   the head in front         heads   pinned heads [[layer, head]]; not empty = several-heads mode
// side, word               the word in front         pins    pinned words [{side, word}]
// target                   the unit at the far end of the pair whose number is explained; null = the strongest link
// mode "to" | "from"       what it looks at | who looks at it         unit "word" | "token"
// view "sentence" | "heads" | "map" | "effects" | "compare"     sort "position" | "link" | a measure      origin: is "how it came about" open
// first: the first unit shown of a long text     camera: {scale: px a token, row, col at the middle} of a large map, null = all
// kind "max" | "mass": what a cell of a large map stands for
// over "" | one of OVER: heads and layers as one     bare: sinks hidden, the rest scaled up     special: are markers shown
// shade "" | "received" | "given": every word shaded     top, least: how many lines a word has, and from which weight on
// other: the text that this one is compared with
// a pin of several words has a last one: {side, word, last}

import { translateUnit } from "./recording.js";
import { HUES } from "./colour.js";
import { SHOWN, SMALLEST } from "./links.js";

export const OVER = ["layer-mean", "layer-max", "all-mean", "all-max"];
const VIEWS = ["heads", "map", "effects", "compare"];
const LEAD = 60; // units before the word that a long text is opened at
const PART = 320;

export function initialSelection(payload) {
  const start = payload.selection ?? {};
  const index = start.attention ?? 0;
  const attention = payload.attentions[index];
  return {
    attention: index,
    layer: attention.layers.includes(start.layer) ? start.layer : attention.layers[attention.layers.length - 1],
    head: start.head >= 0 && start.head < attention.num_heads ? start.head : 0,
    side: attention.query_side,
    word: start.word ?? null,
    target: start.target ?? null,
    pins: [],
    heads: [],
    mode: "to",
    unit: "word",
    view: "sentence",
    sort: "position",
    origin: false,
    first: Math.max(0, (start.word ?? 0) - LEAD),
    camera: null,
    kind: "max",
    over: "",
    bare: false,
    special: true,
    shade: "",
    top: SHOWN,
    least: SMALLEST,
    other: "",
  };
}

const same = (a, b) => a.side === b.side && a.word === b.word;
export const isPinned = (selection, side, word) => selection.pins.some((pin) => same(pin, { side, word }));
export const hueOfPin = (selection, side, word) => selection.pins.findIndex((pin) => same(pin, { side, word }));

export function focusWord(selection, side, word) {
  if (selection.side === side && selection.word === word) return selection;
  const near = word >= selection.first && word < selection.first + PART;
  return { ...selection, side, word, target: null, first: near ? selection.first : Math.max(0, word - LEAD) };
}

export function togglePin(selection, side, word) {
  const at = { side, word };
  const pins = isPinned(selection, side, word)
    ? selection.pins.filter((pin) => !same(pin, at))
    : [...selection.pins.slice(-(HUES - 1)), at];
  return { ...focusWord(selection, side, word), pins };
}

// From the word in front (or, where that is this one, the last pin) to this one, pinned as one.
export function pinSpan(selection, side, word) {
  const start = selection.side === side && selection.word !== word ? selection.word : (selection.pins.filter((pin) => pin.side === side).pop()?.word ?? null);
  if (start === null || start === word) return togglePin(selection, side, word);
  const [first, last] = [Math.min(start, word), Math.max(start, word)];
  const pins = selection.pins.filter((pin) => !(pin.side === side && (pin.word === first || pin.word === start)));
  return { ...focusWord(selection, side, first), pins: [...pins.slice(-(HUES - 1)), { side, word: first, last }] };
}

export const unpin = (selection) => ({ ...selection, pins: [] });

export function moveWord(selection, recording, step) {
  const count = recording.units(selection.side, selection.unit).length;
  if (!count) return selection;
  const from = selection.word ?? (step > 0 ? -1 : count);
  const word = Math.min(count - 1, Math.max(0, from + step));
  return focusWord(selection, selection.side, word);
}

export function moveHead(selection, recording, layerStep, headStep) {
  const { layers, num_heads } = recording.attention(selection.attention);
  const at = Math.min(layers.length - 1, Math.max(0, layers.indexOf(selection.layer) + layerStep));
  const head = Math.min(num_heads - 1, Math.max(0, selection.head + headStep));
  return { ...selection, layer: layers[at], head, target: selection.target };
}

const sameHead = (a, b) => a[0] === b[0] && a[1] === b[1];

// A click on a head: in several-heads mode it joins or leaves the drawn ones, else it comes to the front.
export function chooseHead(selection, layer, head) {
  if (!selection.heads.length) return { ...selection, layer, head };
  const at = [layer, head];
  if (!selection.heads.some((h) => sameHead(h, at)))
    return { ...selection, layer, head, heads: [...selection.heads.slice(-(HUES - 1)), at] };
  const heads = selection.heads.filter((h) => !sameHead(h, at));
  if (!heads.length) return { ...selection, layer, head };
  const [nextLayer, nextHead] = heads[heads.length - 1];
  return { ...selection, heads, layer: nextLayer, head: nextHead };
}

export const toggleSeveral = (selection) => ({
  ...selection,
  heads: selection.heads.length ? [] : [[selection.layer, selection.head]],
});

// The heads that are drawn, in the order of their hues: the pinned ones, and the one in front.
export function drawnHeads(selection) {
  const front = [selection.layer, selection.head];
  if (!selection.heads.length) return [front];
  return selection.heads.some((h) => sameHead(h, front)) ? selection.heads : [...selection.heads, front];
}

export function setUnit(selection, recording, unit) {
  if (selection.unit === unit) return selection;
  const move = (side, word) => translateUnit(recording, side, word, selection.unit, unit);
  const pins = [];
  for (const pin of selection.pins) {
    const word = move(pin.side, pin.word);
    const last = pin.last === undefined ? null : move(pin.side, pin.last);
    if (word !== null && !pins.some((p) => p.side === pin.side && p.word === word)) pins.push({ side: pin.side, word, ...(last > word && { last }) });
  }
  const word = move(selection.side, selection.word);
  return { ...selection, unit, pins, word, target: null, first: Math.max(0, (word ?? move(selection.side, selection.first) ?? 0) - LEAD) };
}

export function setAttention(selection, recording, index) {
  const attention = recording.attention(index);
  const sides = [attention.query_side, attention.key_side];
  const stays = sides.includes(selection.side);
  return {
    ...selection,
    attention: index,
    side: stays ? selection.side : attention.query_side,
    word: stays ? selection.word : null,
    target: null,
    camera: null,
    pins: selection.pins.filter((pin) => sides.includes(pin.side)),
    heads: selection.heads.length ? [] : selection.heads,
    layer: attention.layers.includes(selection.layer) ? selection.layer : attention.layers[attention.layers.length - 1],
    head: Math.min(selection.head, attention.num_heads - 1),
  };
}

export function toHash(selection) {
  const parts = [`l=${selection.layer}`, `h=${selection.head}`];
  if (selection.attention) parts.push(`a=${selection.attention}`);
  if (selection.word !== null) parts.push(`w=${selection.side}.${selection.word}`);
  if (selection.target !== null) parts.push(`t=${selection.target}`);
  if (selection.pins.length) parts.push(`pins=${selection.pins.map((p) => `${p.side}.${p.word}${p.last > p.word ? `-${p.last}` : ""}`).join(",")}`);
  if (selection.heads.length) parts.push(`heads=${selection.heads.map((h) => h.join(".")).join(",")}`);
  if (selection.mode !== "to") parts.push(`mode=${selection.mode}`);
  if (selection.unit !== "word") parts.push("unit=token");
  if (selection.view !== "sentence") parts.push(`view=${selection.view}`);
  if (selection.sort !== "position") parts.push(`sort=${encodeURIComponent(selection.sort)}`);
  if (selection.origin) parts.push("how=1");
  if (selection.first) parts.push(`first=${selection.first}`);
  if (selection.camera) parts.push(`at=${[selection.camera.scale.toPrecision(4), Math.round(selection.camera.row), Math.round(selection.camera.col)].join("_")}`);
  if (selection.kind !== "max") parts.push("cell=mass");
  if (selection.over) parts.push(`over=${selection.over}`);
  if (selection.bare) parts.push("sinks=0");
  if (!selection.special) parts.push("special=0");
  if (selection.shade) parts.push(`shade=${selection.shade}`);
  if (selection.top !== SHOWN) parts.push(`top=${selection.top}`);
  if (selection.least !== SMALLEST) parts.push(`least=${selection.least}`);
  if (selection.other) parts.push(`with=${encodeURIComponent(selection.other)}`);
  return `#${parts.join("&")}`;
}

function plain(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

// An address may come from anywhere: what does not fit this recording is left out, never an error.
export function fromHash(hash, recording) {
  const start = initialSelection(recording.payload);
  const fields = {};
  for (const part of hash.replace(/^#/, "").split("&")) {
    const [key, value] = part.split("=");
    if (value !== undefined) fields[key] = value;
  }
  if (!Object.keys(fields).length) return start;
  const whole = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : null);
  const pairs = (text) => (text ?? "").split(",").map((p) => p.split(".").map(whole)).filter((p) => p.length === 2 && p[0] !== null && p[1] !== null);
  const index = whole(fields.a) ?? (fields.l === undefined ? start.attention : 0);
  const attention = recording.attention(index) ?? recording.attention(start.attention);
  const selection = { ...start, attention: recording.payload.attentions.indexOf(attention), word: null, target: null };
  selection.unit = fields.unit === "token" ? "token" : "word";
  selection.mode = fields.mode === "from" ? "from" : "to";
  selection.view = VIEWS.includes(fields.view) ? fields.view : "sentence";
  const sorts = ["link", ...(attention.measures ?? []), ...Object.keys(recording.payload.head_scores ?? {})];
  selection.sort = sorts.find((name) => encodeURIComponent(name) === fields.sort) ?? "position";
  selection.over = OVER.includes(fields.over) && !attention.long ? fields.over : "";
  selection.bare = fields.sinks === "0" && !attention.long;
  selection.special = fields.special !== "0";
  selection.shade = ["received", "given"].includes(fields.shade) && !attention.long ? fields.shade : "";
  if (whole(fields.top)) selection.top = Math.min(40, whole(fields.top));
  if (fields.least >= 0 && fields.least < 1) selection.least = Number(fields.least);
  selection.origin = fields.how === "1";
  selection.first = whole(fields.first) ?? 0;
  selection.other = plain(fields.with ?? "").slice(0, 2000);
  selection.kind = fields.cell === "mass" ? "mass" : "max";
  const [scale, row, col] = (fields.at ?? "").split("_").map(Number);
  if (scale > 0 && scale < 100 && row >= 0 && col >= 0) selection.camera = { scale, row, col };
  const exists = ([layer, head]) => attention.layers.includes(layer) && head < attention.num_heads;
  const asked = [whole(fields.l), whole(fields.h)];
  [selection.layer, selection.head] = exists(asked) ? asked : exists([start.layer, start.head]) ? [start.layer, start.head] : [attention.layers[0], 0];
  const sides = [attention.query_side, attention.key_side];
  selection.side = sides.includes(start.side) ? start.side : attention.query_side;
  const stands = ([side, word]) => sides.includes(side) && word < recording.units(side, selection.unit).length;
  const word = pairs(fields.w).filter(stands)[0];
  if (word) {
    [selection.side, selection.word] = word;
    if (selection.word < selection.first || selection.word >= selection.first + PART) selection.first = Math.max(0, selection.word - LEAD);
  }
  const target = whole(fields.t);
  const far = selection.side === attention.query_side ? attention.key_side : attention.query_side;
  if (target !== null && stands([far, target])) selection.target = target;
  selection.pins = (fields.pins ?? "").split(",").flatMap((text) => {
    const [first, end] = text.split("-");
    const [at] = pairs(first).filter(stands);
    const last = whole(end);
    return at ? [{ side: at[0], word: at[1], ...(last > at[1] && stands([at[0], last]) && { last }) }] : [];
  }).slice(0, HUES);
  selection.heads = pairs(fields.heads).filter(exists).slice(0, HUES);
  return selection;
}
