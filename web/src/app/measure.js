// Text widths of the fonts that this browser really draws.

import { setRise } from "../paint/dom.js";

let pen = null;
let font = "";
const context = () => (pen ??= document.createElement("canvas").getContext("2d"));
const family = () => (font ||= getComputedStyle(document.documentElement).fontFamily);
const known = new Map();

export function measure(text, size, weight = 400) {
  const key = `${size}/${weight}/${text}`;
  if (known.has(key)) return known.get(key);
  context().font = `${weight} ${size}px ${family()}`;
  const width = context().measureText(text).width;
  if (known.size > 20000) known.clear();
  known.set(key, width);
  return width;
}

// Where HTML text stands relative to its baseline, read once from the font.
export function readRise() {
  context().font = `100px ${family()}`;
  const { fontBoundingBoxAscent: up, fontBoundingBoxDescent: down } = context().measureText("x");
  if (up) setRise((up - down) / 200);
}
