// Tiles on their way: the newest wish first, a few at a time, a bounded number kept, partial ones asked for again.

import { toArray } from "../core/blob.js";
import { pooledTile } from "../core/pool.js";

const KEPT = 192; // 256 KB each
const AT_ONCE = 4;

// raw(key) -> {bytes, shape, dtype, share} or null. -> {get(key, wanted), failure}
export function createTiles(recording, raw, arrived) {
  const known = new Map();
  const wishes = new Map();
  let flying = 0;
  const tiles = {
    failure: null,
    keys: () => [...known.keys()],
    get(key, wanted) {
      const held = known.get(key);
      if (held) {
        known.delete(key);
        known.set(key, held);
      }
      if (wanted && (!held || (held.share < 1 && performance.now() - held.time > 300))) wish(key);
      return held;
    },
    // Wishes of an older picture are dropped: only what is looked at is fetched.
    forget: () => wishes.clear(),
  };
  function wish(key) {
    if (tiles.failure?.keys.has(key)) return;
    wishes.delete(key);
    wishes.set(key, true);
    next();
  }
  const flight = new Set();
  async function next() {
    while (flying < AT_ONCE && wishes.size) {
      const key = [...wishes.keys()].pop();
      wishes.delete(key);
      if (flight.has(key)) continue;
      flight.add(key);
      flying++;
      fetchOne(key).finally(() => {
        flying--;
        flight.delete(key);
        arrived();
        next();
      });
    }
  }
  async function fetchOne(key) {
    try {
      const found = await raw(key);
      const blob = found ? { ...toArray(found.bytes, found.shape, found.dtype), share: found.share ?? 1 } : await pooledTile(recording, key);
      if (!blob) throw new Error("This part of the map is not in this file. Open the text with regard look to see it.");
      blob.time = performance.now();
      known.delete(key);
      known.set(key, blob);
      for (const old of known.keys()) {
        if (known.size <= KEPT) break;
        known.delete(old);
      }
      if (blob.share < 1) setTimeout(arrived, 350);
    } catch (error) {
      if (error.status === 429) return void setTimeout(arrived, 400);
      tiles.failure ??= { keys: new Set(), text: error.message };
      tiles.failure.keys.add(key);
    }
  }
  return tiles;
}
