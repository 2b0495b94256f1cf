// The links of one word in one head: which ones are drawn, what the rest adds up to, and what the sum is.

import { percent, roleOf } from "./words.js";

export const SHOWN = 6; // lines of a word, at most, and the least weight of one: what the page opens with
export const SMALLEST = 0.02;
const MANY = 400; // links that are listed of a long text; the rest is in the sum

// Which way a word is asked: "to" reads its row (what it looks at), "from" its column (who looks at it).
export function directionOf(attention, side, mode) {
  if (attention.query_side === attention.key_side) return mode;
  return side === attention.query_side ? "to" : "from";
}

// -> null while the map is missing, else {direction, other, shown, rest, total, sink, unseen}
//    shown: links {unit, side, from, to, weight, role, text}, strongest first; rest: {count, weight} of the links not shown
// last: the last word of a span; the rows of a span are averaged, its columns added.
export function linksOf(recording, selection, { side, word, last = word, layer, head }) {
  const { attention: index, unit, mode, target, special = true, bare, top = SHOWN, least: smallest = SMALLEST } = selection;
  const attention = recording.attention(index);
  const direction = directionOf(attention, side, mode);
  const weights = spanRow(recording, selection, { word, last, layer, head }, direction);
  if (!weights) return weights;
  const other = direction === "to" ? attention.key_side : attention.query_side;
  const units = recording.units(other, unit);
  let floor = -1;
  if (weights.length > MANY) floor = Float64Array.from(weights).sort()[weights.length - MANY];
  const all = [];
  let [total, seen] = [0, 0];
  for (let i = 0; i < weights.length; i++) {
    const weight = weights[i];
    total += weight;
    if (weight > 0) seen++;
    if (weight < floor && i !== target) continue;
    if (weight === floor && all.length >= 2 * MANY && i !== target) continue;
    const [from, to] = direction === "to" ? [word, i] : [i, word];
    const role = direction === "to" ? roleOf(units[i], i, weight > 0 || units[i].special ? recording.received(index, layer, head, unit, i) : 0) : "";
    all.push({ unit: i, side: other, from, to, weight, text: units[i].text, role });
  }
  all.sort((a, b) => b.weight - a.weight || a.unit - b.unit);
  const named = special ? all : all.filter((link) => !units[link.unit].special);
  const least = Math.min(smallest, named.length ? named[0].weight / 3 : 0);
  const shown = named.slice(0, top).filter((link) => link.weight >= least && link.weight > 0);
  const hidden = all.filter((link) => link.weight > 0 && !shown.includes(link));
  const known = shown.reduce((sum, link) => sum + link.weight, 0);
  return {
    direction,
    other,
    shown,
    all,
    rest: { count: seen - shown.length, weight: Math.max(0, total - known), links: hidden },
    total,
    count: units.length,
    unseen: units.length - seen,
    bare: Boolean(bare),
    sink: attention.has_sink && !bare && direction === "to" && total < 0.9995 && total > 0 ? 1 - total : 0,
    empty: total === 0,
  };
}

export const howOf = ({ heads, over, bare }) => `${heads?.length ? "" : (over ?? "")}${bare ? "/bare" : ""}`;

function spanRow(recording, selection, { word, last, layer, head }, direction) {
  const { attention, unit } = selection;
  const one = (index) => recording.row(attention, layer, head, unit, index, direction, howOf(selection));
  if (last === word) return one(word);
  const rows = Array.from({ length: last - word + 1 }, (_, i) => one(word + i));
  const missing = rows.find((row) => !row);
  if (rows.some((row) => !row)) return missing;
  const count = direction === "to" ? rows.length : 1;
  return rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / count);
}

// What the rest is printed as: rounding never makes the column disagree with its sum.
export function restPercent(links) {
  const exactText = percent(links.rest.weight);
  if (links.direction !== "to" || links.rest.weight < 0.0095) return exactText;
  const shown = links.shown.reduce((sum, link) => sum + Math.round(link.weight * 100), 0);
  const left = Math.round(links.total * 100) - shown;
  return left >= 1 && Math.abs(left - links.rest.weight * 100) < 2 ? `${left} %` : exactText;
}

// The last line of the inspector's sum.
export function sumLine(links) {
  if (links.direction === "from") {
    const total = links.total.toFixed(2);
    return `no sum: each is a share of another word’s attention (${total} of ${links.count} words’ worth)`;
  }
  if (links.empty) return "nothing: every key is masked";
  if (links.bare) return `= ${percent(links.total)} of what is not the sink’s`;
  if (links.sink) return `= ${percent(links.total)}, ${percent(links.sink)} went to the sink`;
  return `= ${percent(links.total)}`;
}

// The strongest links of a whole head, sinks and special tokens left out.
export function strongest(recording, selection, count = 6) {
  const { attention: index, layer, head, unit } = selection;
  if (recording.long(index)) return [];
  const map = recording.map(index, layer, head, unit, howOf(selection));
  if (!map) return null;
  const { query_side, key_side } = recording.attention(index);
  const queries = recording.units(query_side, unit);
  const keys = recording.units(key_side, unit);
  const found = [];
  for (let r = 0; r < map.rows; r++) {
    if (queries[r].special) continue;
    for (let c = 0; c < map.cols; c++) {
      const weight = map.data[r * map.cols + c];
      if ((query_side === key_side && r === c) || roleOf(keys[c], c, map.received[c] / map.rows)) continue;
      if (found.length < count || weight > found[found.length - 1].weight) {
        found.push({ from: r, to: c, weight });
        found.sort((a, b) => b.weight - a.weight);
        if (found.length > count) found.pop();
      }
    }
  }
  return found.map((f) => ({ ...f, fromText: queries[f.from].text, toText: keys[f.to].text }));
}

// All heads by a measure of this text, or by a score that came with the recording, largest first.
export function headsBy(recording, { attention: index }, name) {
  const { layers, num_heads, measures = [] } = recording.attention(index);
  const told = recording.payload.head_scores?.[name];
  const at = measures.indexOf(name);
  const blob = at < 0 ? null : recording.get(`measures/${index}`);
  if (!told && !blob) return [];
  const all = layers.flatMap((layer, row) => Array.from({ length: num_heads }, (_, head) => ({ layer, head, value: told ? told[row]?.[head] : blob.data[(at * layers.length + row) * num_heads + head] })));
  return all.filter(({ value }) => Number.isFinite(value)).sort((a, b) => b.value - a.value);
}

// What a head does over a corpus, in words: its strongest role and score, or "".
export function labelOf(recording, attention, layer, head) {
  const { head_labels: labels, selection } = recording.payload;
  const found = attention === (selection?.attention ?? 0) && labels?.[recording.attention(attention).layers.indexOf(layer)]?.[head];
  return found ? `${found[0]} ${found[1].toFixed(2)}` : "";
}

// The heads in which `from` gives `to` most, of those whose weights are here; for a long text, what --find found.
export function headsOf(recording, { attention: index, unit }, from, to) {
  const attention = recording.attention(index);
  const { found: known, selection } = recording.payload;
  const asked = known && index === selection.attention && unit === "word" && from === selection.word && to === selection.target;
  if (!recording.small(index)) return asked ? [...known].sort((a, b) => b.weight - a.weight) : [];
  const found = [];
  for (const layer of attention.layers)
    for (let head = 0; head < attention.num_heads; head++) {
      const map = recording.map(index, layer, head, unit);
      if (map) found.push({ layer, head, weight: map.data[from * map.cols + to] });
    }
  return found.sort((a, b) => b.weight - a.weight);
}
