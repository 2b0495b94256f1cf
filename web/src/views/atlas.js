// A map of any size: tiles of exact numbers, coarse ones under fine ones. (recording, selection, camera) -> display list

import { CELLS, levelFor, levelOf, tileKey, tilesIn } from "../core/tiles.js";
import { shownText } from "../core/text.js";
import { number, percent } from "../core/words.js";

export const sizeOf = (recording, selection) => {
  const { query_side, key_side } = recording.attention(selection.attention);
  const [rows, cols] = [query_side, key_side].map((side) => recording.payload.sides[side].tokens.length);
  return { rows, cols };
};

// tiles: {get(key, wanted)} -> {shape, data, share} or nothing yet. -> {items, level, share, missing, top}
export function atlasView(recording, selection, camera, room, tiles) {
  const size = sizeOf(recording, selection);
  const fine = levelFor(camera.scale, size);
  const coarse = levelOf(Math.max(size.rows, size.cols));
  const items = [];
  let [share, missing] = [1, 0];
  const whole = tiles.get(tileKey(selection, { level: coarse, row: 0, col: 0 }), true);
  for (let level = coarse; level >= fine; level--)
    for (const tile of tilesIn(camera, level, size, room)) {
      const key = tileKey(selection, tile);
      const blob = tiles.get(key, level === fine);
      if (!blob) {
        if (level === fine) missing++;
        continue;
      }
      if (level === fine) share = Math.min(share, blob.share);
      // a sum over a block of rows is shown as the share that one row gives
      items.push({ t: "tile", key, ...tile, blob, unit: selection.kind === "mass" ? 1 / 2 ** level : 1 });
    }
  return { items, level: fine, share, missing, top: selection.kind === "mass" ? 1 : whole ? most(whole) : 1 };
}

function most(blob) {
  if (blob.most === undefined) blob.most = blob.data.reduce((top, value) => Math.max(top, value), 0) || 1;
  return blob.most;
}

// What stands at a token pair, in words: {row, col} -> text
export function saidAt(recording, selection, at, level, tiles) {
  const { query_side, key_side } = recording.attention(selection.attention);
  const side = CELLS * 2 ** level;
  const tile = { level, row: Math.floor(at.row / side), col: Math.floor(at.col / side) };
  const blob = tiles.get(tileKey(selection, tile), false);
  const cell = [at.row, at.col].map((token) => Math.floor(token / 2 ** level));
  const value = blob?.data[(cell[0] % CELLS) * blob.shape[1] + (cell[1] % CELLS)];
  const name = (which, token, first) => {
    const { tokens } = recording.payload.sides[which];
    const text = `“${shownText(tokens[token].text)}”`;
    return level ? `${first}–${Math.min(tokens.length, first + 2 ** level) - 1} (${text})` : `${token} ${text}`;
  };
  const place = `row ${name(query_side, at.row, cell[0] * 2 ** level)}, column ${name(key_side, at.col, cell[1] * 2 ** level)}`;
  if (value === undefined) return `${place}: on its way`;
  const rows = Math.min(2 ** level, sizeOf(recording, selection).rows - cell[0] * 2 ** level);
  const what = level === 0 ? "" : selection.kind === "mass" ? "these rows give these columns " : "largest weight ";
  const shown = selection.kind === "mass" ? value / rows : value;
  return `${place}: ${what}${shown > 0 ? `${percent(shown)} (${number(shown)})` : blob.share < 1 ? "0, partial" : "0"}`;
}

// The table twin: the cells around the middle of the picture, as rows of text.
export function atlasTable(recording, selection, camera, level, tiles, count = 8) {
  const size = sizeOf(recording, selection);
  const { query_side, key_side } = recording.attention(selection.attention);
  const step = 2 ** level;
  const start = (middle, length) => Math.max(0, Math.min(Math.ceil(length / step) - count, Math.floor(middle / step - count / 2)));
  const [r0, c0] = [start(camera.row, size.rows), start(camera.col, size.cols)];
  const range = (first, length) => Array.from({ length: Math.min(count, Math.ceil(length / step) - first) }, (_, i) => first + i);
  const name = (side, cell) => (step > 1 ? `${cell * step}–${Math.min((cell + 1) * step, recording.payload.sides[side].tokens.length) - 1}` : `${cell} ${shownText(recording.payload.sides[side].tokens[cell].text)}`);
  const at = (r, c) => {
    const tile = { level, row: Math.floor(r / CELLS), col: Math.floor(c / CELLS) };
    const blob = tiles.get(tileKey(selection, tile), true);
    const value = blob?.data[(r % CELLS) * blob.shape[1] + (c % CELLS)];
    return value === undefined ? "…" : percent(selection.kind === "mass" ? value / Math.min(step, size.rows - r * step) : value);
  };
  return {
    head: range(c0, size.cols).map((c) => name(key_side, c)),
    rows: range(r0, size.rows).map((r) => ({ name: name(query_side, r), cells: range(c0, size.cols).map((c) => at(r, c)) })),
  };
}
