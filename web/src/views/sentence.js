// The sentence: words as buttons, and lines from the chosen word to what it looks at. (recording, selection) -> display list

import { dash, hue } from "../core/colour.js";
import { howOf, linksOf, restPercent } from "../core/links.js";
import { drawnHeads, hueOfPin } from "../core/selection.js";
import { column, flow } from "../core/text.js";
import { percent, plural, roleOf } from "../core/words.js";

export const LINE_WIDTH = 14; // px of a line whose weight is 1: width is proportional to weight, whatever else is drawn
const LABEL = 17;
const BUNDLE = 48;
const EXCERPT = 320; // words of a long text that stand on the page at a time

// The part of a side that is shown: [first, end). A long text is turned like pages; the word in front is always on one.
export function excerpt(recording, selection, side) {
  const { length } = recording.units(side, selection.unit);
  if (length <= 2 * EXCERPT) return [0, length];
  const first = Math.min(Math.max(0, selection.first), length - EXCERPT);
  return [first, first + EXCERPT];
}

// hover: {side, word} or null. -> {width, height, items}
export function sentenceView(recording, selection, { width, measure, hover = null, compact = false }) {
  const attention = recording.attention(selection.attention);
  const sides = attention.query_side === attention.key_side ? [attention.query_side] : [attention.key_side, attention.query_side];
  const layout = place(recording, selection, sides, { width, measure, compact });
  const askers = askersOf(selection, hover);
  const heads = drawnHeads(selection);
  const several = selection.heads.length > 0;
  const lines = [];
  const bundles = [];
  const labels = new Map();
  const tints = shading(recording, selection, sides);

  for (const asker of askers) {
    if (!layout.box(asker.side, asker.word)) continue;
    heads.forEach(([layer, head], headIndex) => {
      const links = linksOf(recording, selection, { ...asker, layer, head });
      if (!links) return;
      const index = several ? headIndex : asker.hue;
      const style = { colour: hue(index), dashed: several || askers.length > 1, index, several };
      const shift = several ? headIndex - (heads.length - 1) / 2 : 0;
      const near = links.shown.filter((link) => layout.box(link.side, link.unit));
      const start = spread(layout, asker, near);
      for (const link of near) {
        lines.push(line(layout, asker, link, { start: start.get(link.unit), shift }, style, { layer, head }));
        if (asker.front) label(labels, asker, link, several ? headIndex : null);
      }
      if (asker.front && !several) {
        if (!selection.shade) for (const link of links.all) if (link.weight > 0 && layout.box(link.side, link.unit)) tints.set(`${link.side}.${link.unit}`, { colour: style.colour, weight: link.weight });
        if (links.rest.count) bundles.push(bundle(layout, asker, links, style));
      }
    });
  }
  lines.sort((a, b) => b.data.weight - a.data.weight); // thin ones over thick ones: none is hidden

  const items = [...bundles.map((b) => b.path), ...lines];
  for (const side of sides)
    items.push({
      t: "group",
      key: `side${side}`,
      role: "group",
      name: sides.length > 1 ? `${recording.payload.sides[side].name} words` : "words",
      items: words(recording, selection, side, layout, { askers, tints }),
    });
  items.push(...ties(layout, sides), ...numbers(layout, labels, bundles.flatMap((b) => b.label), measure), ...layout.titles);
  return { width, height: layout.height, items };
}

// Every word shaded at once: by the mean share it receives, or by the share it gives to other words.
export function shading(recording, selection, sides) {
  const tints = new Map();
  const { attention: index, layer, head, unit, shade } = selection;
  const map = shade && !recording.long(index) && recording.map(index, layer, head, unit, howOf(selection));
  if (!map) return tints;
  const { query_side, key_side } = recording.attention(index);
  const side = shade === "received" ? key_side : query_side;
  if (!sides.includes(side)) return tints;
  const keys = recording.units(key_side, unit);
  const values = recording.units(side, unit).map((_, i) => {
    if (shade === "received") return map.received[i] / map.rows;
    let sum = 0;
    for (let c = 0; c < map.cols; c++) if (!(query_side === key_side && c === i) && !roleOf(keys[c], c, map.received[c] / map.rows)) sum += map.data[i * map.cols + c];
    return sum;
  });
  const most = Math.max(...values) || 1;
  values.forEach((value, i) => tints.set(`${side}.${i}`, { colour: "accent", weight: value / most, value }));
  return tints;
}

// The words that lines start from: the pinned ones, and the one in front (hovered, else focused).
export function askersOf(selection, hover) {
  const front = hover ?? (selection.word === null ? null : { side: selection.side, word: selection.word });
  const askers = selection.pins.map((pin, i) => ({ ...pin, hue: i, front: false }));
  if (!front) return askers;
  const pinned = hueOfPin(selection, front.side, front.word);
  if (pinned >= 0) askers[pinned].front = true;
  else askers.push({ ...front, hue: askers.length, front: true });
  return askers;
}

function place(recording, selection, sides, { width, measure, compact }) {
  const parts = new Map(sides.map((side) => [side, excerpt(recording, selection, side)]));
  const all = sides.map((side) => recording.units(side, selection.unit).slice(...parts.get(side)));
  const count = all.reduce((sum, units) => sum + units.length, 0);
  const size = count > 160 ? 18 : 22;
  const blocks = new Map();
  const titles = [];
  let height;
  let columns = false;
  let gap = 44;
  if (sides.length === 1) {
    const rows = flow(all[0], measure, { width, size, pitch: 0 }).rows;
    const pitch = Math.round(size * 1.55) + LABEL + (rows > 8 ? 2 : rows > 3 ? 24 : 44);
    const head = rows === 1 ? 128 : rows <= 3 && !compact ? 96 : 64;
    blocks.set(sides[0], flow(all[0], measure, { width, size, pitch, top: head }));
    gap = pitch - Math.round(size * 1.55);
    height = head + blocks.get(sides[0]).height + 2 * LABEL + 8;
  } else {
    columns = compact;
    const title = (side, x, y, anchor = "start") =>
      titles.push({ t: "text", x, y, text: recording.payload.sides[side].name, size: 13, fill: "soft", anchor });
    if (columns) {
      const each = Math.floor(width * 0.36);
      const options = { width: each, size: 18, pitch: 44, top: 32 };
      blocks.set(sides[0], column(all[0], measure, { ...options, left: 0 }));
      blocks.set(sides[1], column(all[1], measure, { ...options, left: width - each, align: "right" }));
      title(sides[0], 0, 16);
      title(sides[1], width, 16, "end");
      height = 32 + Math.max(...sides.map((side) => blocks.get(side).height)) + LABEL + 8;
    } else {
      const pitch = Math.round(size * 1.55) + LABEL + 14;
      blocks.set(sides[0], flow(all[0], measure, { width, size, pitch, top: 48 }));
      const between = 48 + blocks.get(sides[0]).height + 128;
      blocks.set(sides[1], flow(all[1], measure, { width, size, pitch, top: between }));
      title(sides[0], 4, 16);
      title(sides[1], 4, between + blocks.get(sides[1]).height + LABEL + 14);
      height = between + blocks.get(sides[1]).height + LABEL + 24;
    }
  }
  const box = (side, unit) => blocks.get(side)?.boxes[unit - parts.get(side)[0]];
  return { blocks, box, parts, width, height, columns, gap, two: sides.length > 1, titles, top: sides[0], size };
}

// Where each line leaves its word: side by side in the order of their targets, so that they do not cross at the start.
function spread(layout, asker, shown) {
  const box = layout.box(asker.side, asker.word);
  const order = [...shown].sort((a, b) => layout.box(a.side, a.unit).x - layout.box(b.side, b.unit).x);
  const step = Math.min(7, (box.w - 8) / Math.max(1, order.length));
  return new Map(order.map((link, i) => [link.unit, (i - (order.length - 1) / 2) * step]));
}

const round = (value) => Math.round(value * 10) / 10;

// The curve of one link. start: px from the middle of the asking word; shift: which of several heads, around zero.
function curve(layout, asker, link, { start = 0, shift = 0 } = {}) {
  const from = layout.box(asker.side, asker.word);
  const to = layout.box(link.side, link.unit);
  const path = (x1, y1, ax, ay, bx, by, x2, y2) => `M${round(x1)} ${round(y1)}C${[ax, ay, bx, by, x2, y2].map(round).join(" ")}`;
  if (layout.columns) {
    const left = asker.side !== layout.top; // the asking word stands on the right
    const [x1, x2] = left ? [from.x, to.x + to.w] : [from.x + from.w, to.x];
    const [y1, y2] = [from.y + from.h / 2 + start / 2, to.y + to.h / 2 + shift * 5];
    return path(x1, y1, (x1 + x2) / 2, y1, (x1 + x2) / 2, y2, x2, y2);
  }
  const apart = Math.min(10, (to.w - 8) / 4) * shift;
  const [x1, x2] = [from.x + from.w / 2 + start, to.x + to.w / 2 + apart];
  if (!layout.two && from.row === to.row) {
    const room = from.row === 0 ? from.y - 24 : layout.gap;
    if (asker.word === link.unit) {
      const h = Math.min(room, 34) + shift * 6;
      return path(x1 - 5, from.y, x1 - 22, from.y - h, x1 + 22, from.y - h, x1 + 5, from.y);
    }
    const far = Math.abs(x2 - x1);
    const h = Math.min(room, 24 + 0.3 * far) / 0.75 + shift * 8;
    const lean = Math.min(40, far * 0.12) * Math.sign(x2 - x1);
    return path(x1, from.y, x1 + lean, from.y - h, x2 - lean, to.y - h, x2, to.y);
  }
  const up = to.y < from.y;
  const y1 = up ? from.y : from.y + from.h;
  const y2 = up ? to.y + to.h : to.y;
  const bend = (y2 - y1) * 0.5 + shift * 6;
  return path(x1, y1, x1, y1 + bend, x2, y2 - bend, x2, y2);
}

function line(layout, asker, link, ends, style, { layer, head }) {
  const width = link.weight * LINE_WIDTH;
  return {
    t: "path",
    key: `line${layer}.${head}.${asker.side}.${asker.word}.${link.unit}`,
    d: curve(layout, asker, link, ends),
    stroke: style.colour,
    width: Math.round(width * 1e4) / 1e4,
    opacity: style.several ? 0.85 : round2(0.35 + 0.65 * link.weight),
    dash: style.dashed && width >= 1 ? dash(style.index, width) : "",
    data: { from: link.from, to: link.to, weight: link.weight, layer, head },
  };
}

const round2 = (value) => Math.round(value * 100) / 100;

function bundle(layout, asker, links, style) {
  const path = {
    t: "path",
    key: "bundle",
    d: links.rest.links.filter((link) => layout.box(link.side, link.unit)).slice(0, BUNDLE).map((link) => curve(layout, asker, link)).join(""),
    stroke: style.colour,
    width: 0.6,
    opacity: round2(0.15 + 0.3 * Math.min(1, links.rest.weight)),
    data: { bundle: links.rest.count },
  };
  if (links.direction === "from" || links.rest.weight < 0.005) return { path, label: [] };
  const text = `${plural(links.rest.count, "other")} ${restPercent(links)}`;
  return { path, label: [{ side: asker.side, unit: asker.word, text, above: false, fill: "soft", weight: 0 }] };
}

// The number beside a word stands where its line does not arrive.
function label(labels, asker, link, index) {
  const key = `${link.side}.${link.unit}`;
  const known = labels.get(key);
  if (!known || known.weight < link.weight) labels.set(key, { ...link, index, asker });
}

// Labels, strongest first; one that would cover a stronger one gives way (the inspector has every number).
function numbers(layout, labels, sums, measure) {
  const taken = [];
  const out = [];
  const wanted = [...labels.values()].map(({ side, unit, index, weight, asker }) => {
    const [from, to] = [layout.box(asker.side, asker.word), layout.box(side, unit)];
    const above = layout.two ? side === layout.top : to.y < from.y;
    return { side, unit, weight, above, fill: "ink", text: `${index === null ? "" : `${index + 1}: `}${percent(weight)}` };
  });
  wanted.sort((a, b) => b.weight - a.weight);
  for (const { side, unit, text, above, fill, weight } of [...wanted, ...sums]) {
    const box = layout.box(side, unit);
    const bold = weight > 0.2 ? 600 : 400;
    const w = measure(text, 12, bold) + (weight ? 4 : 20);
    const left = side === layout.top;
    const at = layout.columns
      ? { x: left ? box.x : box.x + box.w, y: box.y + box.h + 12, anchor: left ? "start" : "end" }
      : { x: box.x + box.w / 2, y: above ? box.y - 5 : box.y + box.h + 13, anchor: "middle" };
    if (at.anchor === "middle") at.x = Math.max(w / 2, Math.min(layout.width - w / 2, at.x));
    const edge = at.x - { start: 0, middle: w / 2, end: w }[at.anchor];
    const free = (y) => !taken.some((t) => Math.abs(t.y - y) < 13 && edge < t.x + t.w && t.x < edge + w);
    if (!free(at.y)) {
      if (weight || layout.gap < 2 * LABEL || !free(at.y + 15)) continue;
      at.y += 15;
    }
    taken.push({ x: edge, y: at.y, w });
    out.push({ t: "text", ...at, text, size: 12, fill, weight: bold, plate: true, tabular: true });
  }
  return out;
}

function words(recording, selection, side, layout, { askers, tints }) {
  const units = recording.units(side, selection.unit);
  const current = selection.side === side && selection.word !== null ? selection.word : null;
  const [first] = layout.parts.get(side);
  return layout.blocks.get(side).boxes.flatMap((box, at) => {
    if (units[first + at].special && !selection.special) return [];
    const i = first + at;
    const asker = askers.find((a) => a.side === side && a.word <= i && i <= (a.last ?? a.word));
    const tint = tints.get(`${side}.${i}`);
    const pinned = selection.pins.findIndex((pin) => pin.side === side && pin.word <= i && i <= (pin.last ?? pin.word));
    const inside = [];
    if (tint) inside.push({ t: "rect", x: 0, y: 0, w: box.w, h: box.h, r: 4, fill: tint.colour, opacity: round2(0.34 * tint.weight) });
    if (asker) {
      const index = pinned >= 0 ? pinned : asker.hue;
      const colour = selection.heads.length ? "ink" : hue(index);
      inside.push({ t: "path", d: frame(box.w, box.h), stroke: colour, width: pinned >= 0 ? 2 : 1.25, dash: selection.pins.length > 1 ? dash(index) : "", opacity: 1 });
    }
    inside.push({
      t: "text",
      x: box.w / 2,
      y: Math.round(box.h / 2 + box.size * 0.35),
      text: box.text,
      size: box.size,
      fill: units[i].special ? "soft" : "ink",
      anchor: "middle",
    });
    const said = selection.shade && tint && box.w > 30 ? ` ${percent(tint.value)}` : "";
    if (said) inside.push({ t: "text", x: box.w / 2, y: box.h + 10, text: percent(tint.value), size: 10, fill: "soft", anchor: "middle", tabular: true, quiet: true });
    return {
      t: "button",
      key: `word${side}.${i}`,
      kind: "word",
      x: box.x,
      y: box.y,
      w: box.w,
      h: box.h,
      name: (units[i].text.trim() || box.text) + said,
      pressed: pinned >= 0,
      tab: current === null ? at === 0 && side === firstSide(selection, recording) : current === i,
      action: { type: "pin", side, word: i },
      data: { word: i, side },
      items: inside,
    };
  });
}

function firstSide(selection, recording) {
  return recording.attention(selection.attention).query_side === selection.side ? selection.side : recording.attention(selection.attention).query_side;
}

const frame = (w, h) => `M5 1H${w - 5}a4 4 0 0 1 4 4V${h - 5}a4 4 0 0 1 -4 4H5a4 4 0 0 1 -4 -4V5a4 4 0 0 1 4 -4Z`;

function ties(layout, sides) {
  const out = [];
  for (const side of sides)
    layout.blocks.get(side).boxes.forEach((box, i, boxes) => {
      if (!box.joined || boxes[i - 1].row !== box.row) return;
      const before = boxes[i - 1];
      const y = box.y + box.h - 4;
      out.push({ t: "path", d: `M${round(before.x + before.w - 7)} ${y}q8 5 16 0`, stroke: "soft", width: 1, opacity: 1 });
    });
  return out;
}


