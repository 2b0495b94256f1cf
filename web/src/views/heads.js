// The heads: a grid of small pictures, one row a layer, groups that share keys bracketed. (recording, selection) -> display list

import { dash, hue } from "../core/colour.js";
import { headsBy, headsOf, labelOf } from "../core/links.js";
import { drawnHeads } from "../core/selection.js";
import { number, percent } from "../core/words.js";

// size: px of a thumbnail; sorted: strongest link from -> to first (the Heads view), else by position
export function headsView(recording, selection, { size = 24, width, pair = null, labels = true } = {}) {
  const attention = recording.attention(selection.attention);
  const { sort } = selection;
  const byLink = pair && sort === "link" ? headsOf(recording, selection, pair.from, pair.to).map((one) => ({ ...one, text: percent(one.weight) })) : [];
  const share = ["previous", "next", "first", "same"].includes(sort);
  const ranked = sort === "link" || sort === "position" ? byLink : headsBy(recording, selection, sort).map((one) => ({ ...one, text: share ? percent(one.value) : number(one.value) }));
  return ranked.length ? rankedGrid(recording, selection, ranked, { size, width }) : positionGrid(recording, selection, attention, { size, labels });
}

function positionGrid(recording, selection, attention, { size, labels }) {
  const gap = size > 24 ? 6 : 2;
  const group = attention.num_heads / attention.num_kv_heads;
  const grouped = group > 1 && attention.num_kv_heads > 1;
  const left = 20;
  const top = grouped ? 24 : 18;
  const x = (head) => left + head * (size + gap) + (grouped ? Math.floor(head / group) * 5 : 0);
  const y = (row) => top + row * (size + gap);
  const items = [];
  if (labels) {
    for (let head = 0; head < attention.num_heads; head++)
      items.push({ t: "text", x: x(head) + size / 2, y: 11, text: String(head), size: 11, fill: head === selection.head ? "ink" : "soft", weight: head === selection.head ? 600 : 400, anchor: "middle" });
    attention.layers.forEach((layer, row) =>
      items.push({ t: "text", x: left - 6, y: y(row) + size / 2 + 4, text: String(layer), size: 11, fill: layer === selection.layer ? "ink" : "soft", weight: layer === selection.layer ? 600 : 400, anchor: "end" }),
    );
  }
  if (grouped)
    for (let g = 0; g < attention.num_kv_heads; g++) {
      const [a, b] = [x(g * group) + 1, x((g + 1) * group - 1) + size - 1];
      items.push({ t: "path", d: `M${a} 20v-4H${b}v4`, stroke: "soft", width: 1, opacity: 1 });
    }
  const thumbs = [];
  const buttons = [];
  attention.layers.forEach((layer, row) => {
    for (let head = 0; head < attention.num_heads; head++) {
      const at = { x: x(head), y: y(row), w: size, h: size };
      thumbs.push({ ...at, layer, head });
      items.push({ t: "rect", ...at, fill: "wash", opacity: 1 });
      buttons.push(cell(selection, layer, head, at), ...badge(selection, layer, head, at));
    }
  });
  const width = x(attention.num_heads - 1) + size + 2;
  const height = y(attention.layers.length - 1) + size + 2;
  items.push({ t: "heat", key: "thumbs", x: 0, y: 0, w: width, h: height, ...atlas(recording, selection, thumbs, width, height) });
  items.push({ t: "group", key: "grid", role: "group", name: grouped ? `heads, in ${attention.num_kv_heads} groups that share keys` : "heads", items: buttons });
  return { width, height, items };
}

function rankedGrid(recording, selection, ranked, { size, width }) {
  const labelled = Boolean(recording.payload.head_labels);
  const [gap, line] = [12, size + (labelled ? 48 : 34)];
  const step = Math.max(size, labelled ? 96 : 56) + gap;
  const columns = Math.max(1, Math.floor((width + gap) / step));
  const thumbs = [];
  const buttons = [];
  const items = [];
  ranked.forEach(({ layer, head, text }, i) => {
    const at = { x: (i % columns) * step + 2, y: Math.floor(i / columns) * line + 2, w: size, h: size };
    thumbs.push({ ...at, layer, head });
    buttons.push(cell(selection, layer, head, at), ...badge(selection, layer, head, at));
    items.push({ t: "text", x: at.x, y: at.y + size + 12, text: `${layer} · ${head}`, size: 11, fill: "soft", anchor: "start" });
    items.push({ t: "text", x: at.x, y: at.y + size + 26, text, size: 12, fill: "ink", anchor: "start", tabular: true });
    if (labelled) items.push({ t: "text", x: at.x, y: at.y + size + 40, text: labelOf(recording, selection.attention, layer, head), size: 12, fill: "soft", anchor: "start", tabular: true });
  });
  const height = Math.ceil(ranked.length / columns) * line + 4;
  return {
    width,
    height,
    items: [
      { t: "heat", key: "thumbs", x: 0, y: 0, w: width, h: height, ...atlas(recording, selection, thumbs, width, height) },
      ...items,
      { t: "group", key: "grid", role: "group", name: "heads, largest first", items: buttons },
    ],
  };
}

function cell(selection, layer, head, { x, y, w, h }) {
  const drawn = drawnHeads(selection);
  const index = drawn.findIndex((d) => d[0] === layer && d[1] === head);
  const several = selection.heads.length > 0;
  const front = layer === selection.layer && head === selection.head;
  const inside = [];
  if (index >= 0) {
    const colour = several ? hue(index) : "accent";
    inside.push({ t: "path", d: `M-1 -1H${w + 1}V${h + 1}H-1Z`, stroke: colour, width: front ? 3 : 2, dash: several ? dash(index) : "", opacity: 1 });
  }
  return {
    t: "button",
    key: `head${layer}.${head}`,
    kind: "head",
    x,
    y,
    w,
    h,
    name: `layer ${layer} head ${head}`,
    pressed: index >= 0,
    tab: front,
    action: { type: "head", layer, head },
    data: { layer, head },
    items: inside,
  };
}

// In several-heads mode each drawn head bears the number of its lines.
function badge(selection, layer, head, { x, y, w, h }) {
  const index = selection.heads.length ? drawnHeads(selection).findIndex((d) => d[0] === layer && d[1] === head) : -1;
  if (index < 0) return [];
  return [
    { t: "rect", x: x + w - 11, y: y + h - 12, w: 11, h: 12, fill: "paper", opacity: 1 },
    { t: "text", x: x + w - 5.5, y: y + h - 2, text: String(index + 1), size: 10, fill: "ink", weight: 600, anchor: "middle", quiet: true },
  ];
}

// One picture for all thumbnails: values 0..255, a pixel each, zero where there is none.
function atlas(recording, selection, thumbs, width, height) {
  const [cols, rows] = [Math.ceil(width), Math.ceil(height)];
  const values = new Uint8Array(cols * rows);
  for (const { x, y, w, layer, head } of thumbs) {
    const thumb = recording.thumb(selection.attention, layer, head);
    const [left, top] = [Math.round(x), Math.round(y)];
    for (let r = 0; r < w; r++)
      for (let c = 0; c < w; c++) {
        const value = thumb ? thumb.data[Math.floor((r * thumb.rows) / w) * thumb.cols + Math.floor((c * thumb.cols) / w)] : 0;
        values[(top + r) * cols + left + c] = value;
      }
  }
  return { rows, cols, values, max: 255 };
}
