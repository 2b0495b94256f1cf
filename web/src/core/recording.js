// One recording as the views read it: units (words or subwords), merged maps, thumbnails. Pure; blobs come from `get`.

import { fromBase64 } from "./blob.js";
import { roleOf } from "./words.js";

const SMALL = 24e6; // bytes

// payload: the page's JSON. get(key) -> {shape, data}, null where it does not exist, undefined while it is on its way.
export function createRecording(payload, get) {
  payload.sides.forEach(unpack);
  const merged = new Map();
  const units = new Map();

  const rows = new Map();
  const recording = {
    payload,
    get,
    attention: (index) => payload.attentions[index],

    // All heads' weights of one attention at once: only where that is little (saved pages hold it, servers send it quickly).
    small(index) {
      const { query_side, key_side, num_heads, layers } = payload.attentions[index];
      const [rows, cols] = [query_side, key_side].map((side) => payload.sides[side].tokens.length);
      return 4 * num_heads * layers.length * rows * cols <= SMALL;
    },

    // The words (or subwords) of one side: {text, special, tokens: [first, last + 1], joined: glued to the one before}
    units(side, unit) {
      const key = `${side}/${unit}`;
      if (!units.has(key)) units.set(key, unit === "token" ? tokenUnits(payload.sides[side]) : wordUnits(payload.sides[side]));
      return units.get(key);
    },

    // Weights of one head between units: {rows, cols, data, max, received}; a row is the mean, a column the sum over tokens.
    // how: "" for this head, "layer-mean", "layer-max", "all-mean", "all-max" over heads; and "/bare" without sinks.
    map(attention, layer, head, unit, how = "") {
      const key = `${attention}/${layer}/${head}/${unit}/${how}`;
      if (merged.has(key)) return merged.get(key);
      const { query_side, key_side, layers, num_heads } = payload.attentions[attention];
      const [over, bare] = how.split("/");
      const blobs = (over.startsWith("all") ? layers : [layer]).map((number) => get(`weights/${attention}/${number}`));
      if (blobs.includes(null)) return null;
      if (blobs.includes(undefined)) return undefined;
      const [queries, keys] = [query_side, key_side].map((side) => recording.units(side, unit));
      const blob = over ? pooled(blobs, num_heads, over.endsWith("max")) : blobs[0];
      let map = merge(blob, over ? 0 : head, queries, keys);
      if (bare !== undefined) map = withoutSinks(map, keys);
      if (merged.size > 600) merged.clear();
      merged.set(key, map);
      return map;
    },

    // A text so long that its weights come by rows and tiles.
    long: (index) => Boolean(payload.attentions[index].long),

    // One unit's weights in one head, by units of the other side: its row ("to") or its column ("from").
    row(attention, layer, head, unit, index, direction, how = "") {
      if (!recording.long(attention)) {
        const map = recording.map(attention, layer, head, unit, how);
        return map && (direction === "to" ? map.data.subarray(index * map.cols, (index + 1) * map.cols) : Float64Array.from({ length: map.rows }, (_, r) => map.data[r * map.cols + index]));
      }
      const { query_side, key_side } = payload.attentions[attention];
      const [own, other] = direction === "to" ? [query_side, key_side] : [key_side, query_side];
      const [first, stop] = recording.units(own, unit)[index].tokens;
      const key = `${direction === "to" ? "row" : "col"}/${attention}/${layer}/${head}/${first}/${stop}`;
      if (rows.has(key + unit)) return rows.get(key + unit);
      const blob = get(key);
      if (!blob) return blob;
      const out = Float64Array.from(recording.units(other, unit), ({ tokens: [from, to] }) => {
        let sum = 0;
        for (let i = from; i < to; i++) sum += blob.data[i];
        return direction === "to" ? sum : sum / Math.max(1, to - from);
      });
      if (rows.size > 40) rows.clear();
      rows.set(key + unit, out);
      return out;
    },

    // Mean weight that a key unit gets from all rows of a head; 0 while that is not known.
    received(attention, layer, head, unit, index) {
      const { key_side, query_side, long, has_received } = payload.attentions[attention];
      if (!long) {
        const map = recording.map(attention, layer, head, unit);
        return map ? map.received[index] / map.rows : 0;
      }
      const blob = has_received && get(`received/${attention}/${layer}`);
      if (!blob) return 0;
      const [from, to] = recording.units(key_side, unit)[index].tokens;
      let sum = 0;
      for (let i = from; i < to; i++) sum += blob.data[head * blob.shape[1] + i];
      return sum / payload.sides[query_side].tokens.length;
    },

    // One head's small picture: {rows, cols, data} of 0..255
    thumb(attention, layer, head) {
      const blob = get(`thumbs/${attention}`);
      if (!blob) return blob;
      const [, heads, rows, cols] = blob.shape;
      const at = payload.attentions[attention].layers.indexOf(layer) * heads + head;
      return { rows, cols, data: blob.data.subarray(at * rows * cols, (at + 1) * rows * cols) };
    },
  };
  return recording;
}

// Heads and layers as one: their mean, or the largest of them at each place.
function pooled(blobs, heads, largest) {
  const [, rows, cols] = blobs[0].shape;
  const data = new Float64Array(rows * cols);
  for (const blob of blobs)
    for (let head = 0; head < heads; head++)
      for (let i = 0, at = head * rows * cols; i < data.length; i++, at++) data[i] = largest ? Math.max(data[i], blob.data[at]) : data[i] + blob.data[at] / heads / blobs.length;
  return { shape: [1, rows, cols], data };
}

// The same rows with the columns of sinks at zero and the rest scaled up to one.
function withoutSinks(map, keys) {
  const { rows, cols } = map;
  const sink = keys.map((key, c) => roleOf(key, c, map.received[c] / rows) === "sink");
  const data = new Float64Array(map.data.length);
  const received = new Float64Array(cols);
  let max = 0;
  for (let r = 0; r < rows; r++) {
    let sum = 0;
    for (let c = 0; c < cols; c++) if (!sink[c]) sum += map.data[r * cols + c];
    for (let c = 0; c < cols; c++) {
      const weight = sink[c] || !sum ? 0 : map.data[r * cols + c] / sum;
      data[r * cols + c] = weight;
      received[c] += weight;
      max = Math.max(max, weight);
    }
  }
  return { ...map, data, received, max };
}

// A long text travels packed: spellings once, tokens and words as numbers; or as a count, where places are the names.
function unpack(side) {
  if (side.tokens) return;
  if (!side.packed) {
    const names = Array.from({ length: side.count }, (_, i) => String(i));
    side.tokens = names.map((text, word) => ({ text, special: false, word }));
    side.words = names.map((text, i) => ({ text, tokens: [i, i + 1], special: false }));
    return;
  }
  const { texts, special } = side.packed;
  const [tokens, words, starts] = ["tokens", "words", "starts"].map((name) => new Int32Array(fromBase64(side.packed[name]).buffer));
  const marked = new Set(special);
  side.words = Array.from(words, (text, i) => ({ text: texts[text], tokens: [starts[i], i + 1 < starts.length ? starts[i + 1] : tokens.length], special: marked.has(i) }));
  side.tokens = [];
  side.words.forEach((word, w) => {
    for (let i = word.tokens[0]; i < word.tokens[1]; i++) side.tokens.push({ text: texts[tokens[i]], special: word.special, word: word.special ? null : w });
  });
}

function wordUnits(side) {
  return side.words.map((word) => ({ text: word.text, special: word.special, tokens: word.tokens, joined: false }));
}

function tokenUnits(side) {
  return side.tokens.map((token, i) => ({
    text: token.text,
    special: token.special,
    tokens: [i, i + 1],
    joined: i > 0 && token.word !== null && token.word === side.tokens[i - 1].word,
  }));
}

function merge({ shape, data }, head, queries, keys) {
  const [, numQ, numK] = shape;
  const start = head * numQ * numK;
  const out = new Float64Array(queries.length * keys.length);
  const received = new Float64Array(keys.length);
  let max = 0;
  queries.forEach((query, r) => {
    const [first, end] = query.tokens;
    for (let c = 0; c < keys.length; c++) {
      const [from, to] = keys[c].tokens;
      let sum = 0;
      for (let i = first; i < end; i++) for (let j = from; j < to; j++) sum += data[start + i * numK + j];
      const weight = end > first ? sum / (end - first) : 0;
      out[r * keys.length + c] = weight;
      received[c] += weight;
      if (weight > max) max = weight;
    }
  });
  return { rows: queries.length, cols: keys.length, data: out, max, received };
}

// Query head h reads key/value head h // group.
export function groupOf(attention) {
  return attention.num_heads / attention.num_kv_heads;
}

// The unit of the other kind that holds the same place: the first token of a word, the word of a token.
export function translateUnit(recording, side, index, from, to) {
  if (index === null || from === to) return index;
  const source = recording.units(side, from)[index];
  if (!source) return null;
  const found = recording.units(side, to).findIndex((u) => u.tokens[0] <= source.tokens[0] && source.tokens[0] < u.tokens[1]);
  return found < 0 ? null : found;
}
