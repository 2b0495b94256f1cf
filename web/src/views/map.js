// The map: every word against every word in one head, up to 512 of them. (recording, selection) -> display list

import { howOf } from "../core/links.js";
import { cut, shownText, wrap } from "../core/text.js";
import { levelOf, tileKey } from "../core/tiles.js";
import { percent } from "../core/words.js";
import { sizeOf } from "./atlas.js";

export const MAP_LIMIT = 512;

export function mapView(recording, selection, { width, measure, hover = null, cell = null }) {
  const { attention: index, layer, head, unit } = selection;
  const attention = recording.attention(index);
  const queries = recording.units(attention.query_side, unit);
  const keys = recording.units(attention.key_side, unit);
  if (Math.max(queries.length, keys.length) > MAP_LIMIT) {
    const coarse = tileFigure(recording, selection, { width, measure });
    if (coarse) return coarse;
    const text = `The map is drawn up to ${MAP_LIMIT} words; this text has ${Math.max(queries.length, keys.length)}. The lines and the list carry the same numbers.`;
    return note(text, width, measure);
  }
  const map = recording.map(index, layer, head, unit, howOf(selection));
  if (map === null) return note(`The weights of layer ${layer} are not in this file. Choose another head.`, width, measure);
  if (!map) return note(`Reading the weights of layer ${layer} …`, width, measure);

  const labelled = Math.max(queries.length, keys.length) <= 48;
  const longest = (units) => Math.min(96, Math.max(...units.map((u) => measure(shownText(u.text), 12, 400))) + 8);
  const gutter = labelled ? Math.ceil(longest(queries)) : 8;
  const room = Math.min(width - gutter - 12, 560);
  const size = Math.max(1, Math.min(34, Math.floor((room / Math.max(keys.length, 1)) * 10) / 10));
  const top = labelled ? Math.ceil(longest(keys)) : 8;
  const [w, h] = [size * keys.length, size * queries.length];
  const left = gutter + 4;
  const items = [{ t: "heat", key: "map", x: left, y: top, w, h, rows: map.rows, cols: map.cols, values: map.data, max: map.max || 1, pick: true, name: `map of layer ${layer} head ${head}: ${queries.length} rows look at ${keys.length} columns` }];
  items.push({ t: "path", d: `M${left} ${top}h${w}v${h}h${-w}Z`, stroke: "faint", width: 1, opacity: 1 });

  const front = hover ?? (selection.word === null ? null : { side: selection.side, word: selection.word });
  const row = front && front.side === attention.query_side && (attention.query_side !== attention.key_side || selection.mode === "to") ? front.word : null;
  const col = front && row === null && front.side === attention.key_side ? front.word : null;
  if (labelled) {
    queries.forEach((u, i) => items.push({ t: "text", x: left - 6, y: top + size * (i + 0.5) + 4, text: cut(shownText(u.text), 92, 12, measure), size: 12, fill: i === row || cell?.row === i ? "ink" : "soft", weight: i === row ? 600 : 400, anchor: "end" }));
    keys.forEach((u, i) => items.push({ t: "text", x: left + size * (i + 0.5) + 4, y: top - 6, text: cut(shownText(u.text), 92, 12, measure), size: 12, fill: i === col || cell?.col === i ? "ink" : "soft", weight: i === col ? 600 : 400, anchor: "start", turn: true }));
  }
  if (row !== null && row < map.rows) items.push({ t: "path", d: `M${left} ${top + row * size}h${w}v${Math.max(2, size)}h${-w}Z`, stroke: "accent", width: 1.5, opacity: 1 });
  if (col !== null && col < map.cols) items.push({ t: "path", d: `M${left + col * size} ${top}v${h}h${Math.max(2, size)}v${-h}Z`, stroke: "accent", width: 1.5, opacity: 1 });
  if (cell) items.push({ t: "path", d: `M${left + cell.col * size} ${top + cell.row * size}h${size}v${size}h${-size}Z`, stroke: "ink", width: 2, opacity: 1 });

  const y = top + h + 24;
  const bar = { x: left, y, w: Math.min(120, w), h: 8 };
  items.push({ t: "heat", key: "legend", ...bar, rows: 1, cols: 64, values: Float64Array.from({ length: 64 }, (_, i) => i / 63), max: 1 });
  items.push({ t: "text", x: bar.x, y: y + 22, text: "0", size: 12, fill: "soft", anchor: "start" });
  items.push({ t: "text", x: bar.x + bar.w, y: y + 22, text: percent(map.max), size: 12, fill: "soft", anchor: "end" });
  const said = cell
    ? `${queries[cell.row].text} → ${keys[cell.col].text} ${percent(map.data[cell.row * map.cols + cell.col])}`
    : "a row is what one word looks at";
  const beside = width - bar.x - bar.w - 24 >= 220;
  const at = beside ? { x: bar.x + bar.w + 16, y: y + 9 } : { x: bar.x, y: y + 44 };
  items.push({ t: "text", ...at, text: cut(said, width - at.x, 13, measure), size: 13, fill: cell ? "ink" : "soft", anchor: "start" });
  return { width, height: y + (beside ? 34 : 54), items };
}

// A large map in a picture: its coarsest tile, on the scale of square roots that the page has.
function tileFigure(recording, selection, { width, measure }) {
  const size = sizeOf(recording, selection);
  const level = levelOf(Math.max(size.rows, size.cols));
  const blob = recording.get(tileKey(selection, { level, row: 0, col: 0 }));
  if (!blob) return null;
  const [rows, cols] = blob.shape;
  const most = blob.data.reduce((top, value) => Math.max(top, value), 0) || 1;
  const scale = Math.min(width - 8, 560) / Math.max(rows, cols);
  const [w, h] = [cols * scale, rows * scale];
  const lines = wrap(`One cell stands for ${2 ** level} × ${2 ** level} weights: the largest of them. Colour grows with the square root; the strongest is ${percent(most)}. ${size.rows} rows look at ${size.cols} columns.`, width - 8, 13, measure);
  return {
    width,
    height: h + 24 + 20 * lines.length,
    items: [
      { t: "heat", key: "map", x: 4, y: 8, w, h, rows, cols, values: Float64Array.from(blob.data, (value) => Math.sqrt(value / most)), max: 1, name: `map of layer ${selection.layer} head ${selection.head}` },
      { t: "path", d: `M4 8h${w}v${h}h${-w}Z`, stroke: "faint", width: 1, opacity: 1 },
      ...lines.map((text, i) => ({ t: "text", x: 4, y: h + 28 + 20 * i, text, size: 13, fill: "soft", anchor: "start" })),
    ],
  };
}

// The map's twin: the same numbers as rows of text. Beyond `limit` units, each row's strongest links.
export function mapTable(recording, selection, limit = 40) {
  const { attention: index, layer, head, unit } = selection;
  const attention = recording.attention(index);
  const map = recording.map(index, layer, head, unit, howOf(selection));
  if (!map) return null;
  const queries = recording.units(attention.query_side, unit);
  const keys = recording.units(attention.key_side, unit);
  const at = (r, c) => map.data[r * map.cols + c];
  if (keys.length <= limit)
    return { head: keys.map((k) => k.text), rows: queries.map((q, r) => ({ name: q.text, cells: keys.map((_, c) => percent(at(r, c))) })) };
  const best = 5;
  const rows = queries.map((q, r) => {
    const order = [...map.data.subarray(r * map.cols, (r + 1) * map.cols)].map((weight, c) => [weight, c]);
    order.sort((a, b) => b[0] - a[0]);
    return { name: q.text, cells: order.slice(0, best).map(([weight, c]) => `${keys[c].text} ${percent(weight)}`) };
  });
  return { head: Array.from({ length: best }, (_, i) => `link ${i + 1}`), rows };
}

function note(text, width, measure) {
  const lines = wrap(text, Math.min(width, 520), 15, measure);
  return { width, height: 40 + lines.length * 22, items: lines.map((line, i) => ({ t: "text", x: 0, y: 32 + i * 22, text: line, size: 15, fill: "soft", anchor: "start" })) };
}
