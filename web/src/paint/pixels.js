// Values as colours: the index picture of a heat item, and a PNG of it for pictures without a canvas.

import { ramp } from "../core/colour.js";
import { toBase64 } from "../core/blob.js";

// {rows, cols, values, max} -> one index 0..255 a cell
export function indices({ values, max }) {
  if (values instanceof Uint8Array && max === 255) return values;
  const out = new Uint8Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i] / max;
    out[i] = value > 0 ? Math.max(1, Math.min(255, Math.round(255 * value))) : 0;
  }
  return out;
}

let table = null;
function crc(bytes) {
  if (!table) {
    table = new Uint32Array(256);
    for (let n = 0; n < 256; n++) {
      let c = n;
      for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
      table[n] = c;
    }
  }
  let c = 0xffffffff;
  for (const byte of bytes) c = table[(c ^ byte) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

const word = (n) => [(n >>> 24) & 255, (n >>> 16) & 255, (n >>> 8) & 255, n & 255];

function chunk(name, body) {
  const inner = new Uint8Array(4 + body.length);
  for (let i = 0; i < 4; i++) inner[i] = name.charCodeAt(i);
  inner.set(body, 4);
  return [...word(body.length), inner, ...word(crc(inner))];
}

// zlib stream of stored blocks: no compression, but every reader reads it
function stored(bytes) {
  const parts = [0x78, 0x01];
  let [a, b] = [1, 0];
  for (const byte of bytes) {
    a = (a + byte) % 65521;
    b = (b + a) % 65521;
  }
  const blocks = [];
  for (let at = 0; at < bytes.length || at === 0; at += 65535) {
    const block = bytes.subarray(at, at + 65535);
    const last = at + 65535 >= bytes.length ? 1 : 0;
    blocks.push([last, block.length & 255, block.length >> 8, ~block.length & 255, (~block.length >> 8) & 255], block);
  }
  return join([parts, ...blocks, word(((b << 16) | a) >>> 0)]);
}

function join(parts) {
  const flat = parts.map((part) => (typeof part === "number" ? [part] : part));
  const out = new Uint8Array(flat.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of flat) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

export function pngUri(heat, theme) {
  const { rows, cols } = heat;
  const cells = indices(heat);
  const raw = new Uint8Array(rows * (cols + 1));
  for (let r = 0; r < rows; r++) raw.set(cells.subarray(r * cols, (r + 1) * cols), r * (cols + 1) + 1);
  const header = [...word(cols), ...word(rows), 8, 3, 0, 0, 0];
  const palette = ramp(theme).flat();
  const png = join([
    [137, 80, 78, 71, 13, 10, 26, 10],
    ...chunk("IHDR", header),
    ...chunk("PLTE", palette),
    ...chunk("tRNS", [0]),
    ...chunk("IDAT", stored(raw)),
    ...chunk("IEND", []),
  ]);
  return `data:image/png;base64,${toBase64(png)}`;
}
