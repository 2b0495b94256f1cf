// Blobs of numbers: base64 text or raw little-endian bytes in, a typed array with a shape out. Pure: no DOM, no atob.

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const VALUE = new Uint8Array(128);
for (let i = 0; i < 64; i++) VALUE[LETTERS.charCodeAt(i)] = i;

export function fromBase64(text) {
  let length = text.length;
  while (length > 0 && text[length - 1] === "=") length--;
  const bytes = new Uint8Array(Math.floor((length * 3) / 4));
  for (let i = 0, o = 0; i < length; i += 4) {
    const word =
      (VALUE[text.charCodeAt(i)] << 18) |
      (VALUE[text.charCodeAt(i + 1)] << 12) |
      ((i + 2 < length ? VALUE[text.charCodeAt(i + 2)] : 0) << 6) |
      (i + 3 < length ? VALUE[text.charCodeAt(i + 3)] : 0);
    if (o < bytes.length) bytes[o++] = word >> 16;
    if (o < bytes.length) bytes[o++] = (word >> 8) & 255;
    if (o < bytes.length) bytes[o++] = word & 255;
  }
  return bytes;
}

export function toBase64(bytes) {
  const parts = [];
  for (let i = 0; i < bytes.length; i += 3) {
    const left = bytes.length - i;
    const word = (bytes[i] << 16) | ((left > 1 ? bytes[i + 1] : 0) << 8) | (left > 2 ? bytes[i + 2] : 0);
    parts.push(
      LETTERS[word >> 18] +
        LETTERS[(word >> 12) & 63] +
        (left > 1 ? LETTERS[(word >> 6) & 63] : "=") +
        (left > 2 ? LETTERS[word & 63] : "="),
    );
  }
  return parts.join("");
}

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const SIZE = { f32: 4, f16: 2, u8: 1 };

// bytes (Uint8Array), shape (list of sizes), dtype ("f32", "f16", "u8") -> {shape, data}
export function toArray(bytes, shape, dtype) {
  const count = shape.reduce((product, size) => product * size, 1);
  if (!(dtype in SIZE)) throw new Error(`blob: dtype must be f32, f16 or u8; got ${dtype}.`);
  if (bytes.length !== count * SIZE[dtype])
    throw new Error(`blob: shape ${shape.join(" × ")} of ${dtype} needs ${count * SIZE[dtype]} bytes; got ${bytes.length}.`);
  if (dtype === "u8") return { shape, data: bytes };
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const data = new Float32Array(count);
  if (dtype === "f32") for (let i = 0; i < count; i++) data[i] = view.getFloat32(4 * i, true);
  else for (let i = 0; i < count; i++) data[i] = half(view.getUint16(2 * i, true));
  return { shape, data };
}
