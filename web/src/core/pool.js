// Tiles of a text that is short enough to hold its weights: sums and maxima of blocks, made on the page.

import { CELLS } from "./tiles.js";

export async function pooledTile(recording, key) {
  const [, attention, layer, head, kind, level, row, col] = key.split("/").map((part) => (/^\d+$/.test(part) ? Number(part) : part));
  const blob = recording.long(attention) ? null : recording.get(`weights/${attention}/${layer}`);
  if (!blob) return null;
  const [, rows, cols] = blob.shape;
  const step = 2 ** level;
  const start = [row, col].map((at) => at * CELLS * step);
  const shape = [rows, cols].map((length, axis) => Math.min(CELLS, Math.ceil((length - start[axis]) / step)));
  const data = new Float32Array(shape[0] * shape[1]);
  for (let r = start[0]; r < Math.min(rows, start[0] + CELLS * step); r++)
    for (let c = start[1]; c < Math.min(cols, start[1] + CELLS * step); c++) {
      const at = Math.floor((r - start[0]) / step) * shape[1] + Math.floor((c - start[1]) / step);
      const weight = blob.data[(head * rows + r) * cols + c];
      data[at] = kind === "mass" ? data[at] + weight : Math.max(data[at], weight);
    }
  return { shape, data, share: 1 };
}
