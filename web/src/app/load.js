// Where blobs come from: the server (live) or the page's own JSON (saved). Loads each once, says when one has come.

import { fromBase64, toArray } from "../core/blob.js";

export async function gunzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

export async function gzip(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// -> {get(key), read(key), failed}: get answers at once ({shape, data}, null: does not exist, undefined: on its way)
export function createLoader(payload, arrived) {
  const known = new Map();
  const loader = {
    failure: null,
    keys: () => [...known].filter(([, blob]) => blob).map(([key]) => key),
    get(key) {
      if (known.has(key)) return known.get(key);
      known.set(key, undefined);
      loader.read(key).then(
        (blob) => {
          known.set(key, blob);
          arrived();
        },
        (error) => {
          loader.failure = error;
          known.set(key, null);
          arrived();
        },
      );
      return undefined;
    },
    async read(key) {
      const raw = await loader.raw(key);
      return raw && toArray(raw.bytes, raw.shape, raw.dtype);
    },
    async raw(key) {
      if (!payload.live) {
        const blob = payload.blobs?.[key];
        return blob ? { bytes: await gunzip(fromBase64(blob.data)), shape: blob.shape, dtype: blob.dtype } : null;
      }
      const reply = await fetch(`api/blob/${key}${payload.serial === undefined ? "" : `?serial=${payload.serial}`}`);
      if (reply.status === 404) return null;
      if (!reply.ok) {
        const said = await reply.json().catch(() => ({}));
        throw Object.assign(new Error(said.error ?? `The server could not give ${key} (${reply.status}).`), { status: reply.status });
      }
      const shape = reply.headers.get("X-Shape").split(",").filter(Boolean).map(Number);
      return { bytes: new Uint8Array(await reply.arrayBuffer()), shape, dtype: reply.headers.get("X-Dtype"), share: Number(reply.headers.get("X-Share") ?? 1) };
    },
  };
  return loader;
}
