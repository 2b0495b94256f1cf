// ⇩: exactly this view as HTML, SVG, PNG or JSON, made in the browser; and the numbers for the clipboard.

import { toBase64 } from "../core/blob.js";
import { howOf, linksOf } from "../core/links.js";
import { tableMeasure } from "../core/measure.js";
import { drawnHeads, toHash } from "../core/selection.js";
import { toSvg } from "../paint/svg.js";
import { figureView } from "../views/figure.js";
import { frontOf, spoken } from "../views/inspector.js";
import { say } from "./actions.js";
import { gzip } from "./load.js";
import { heldKeys, rawBlob, recording, selection, theme } from "./store.js";

// The page as it came, before anything was drawn into it: taken when the script starts.
let source = "";
export const keepSource = () => (source = `<!doctype html>\n${document.documentElement.outerHTML}\n`);

const LARGEST = 48e6; // bytes of weights that a saved page carries

export async function save(format) {
  const name = `regard-layer${selection.value.layer}-head${selection.value.head}.${format}`;
  try {
    const made = { html: page, session: held, svg: async () => svg(), png: picture, json: async () => JSON.stringify(view(), null, 1) };
    const types = { html: "text/html", svg: "image/svg+xml", png: "image/png", json: "application/json", session: "application/json" };
    const body = await made[format]();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(body instanceof Blob ? body : new Blob([body], { type: types[format] }));
    link.download = name;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved ${name}.`);
  } catch (error) {
    say(`Could not save: ${error.message}`);
  }
}

function svg() {
  const width = Math.max(400, Math.min(1600, document.documentElement.clientWidth));
  const list = figureView(recording.value, selection.value, { width, measure: tableMeasure });
  return toSvg(list, { theme: theme.value, title: `${recording.value.payload.text}. ${spoken(recording.value, selection.value)}` });
}

async function picture() {
  const image = new Image();
  image.src = `data:image/svg+xml;base64,${toBase64(new TextEncoder().encode(svg()))}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.width * 2, image.height * 2];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large"))), "image/png"));
}

async function held() {
  const { payload } = recording.value;
  const blobs = payload.live ? await collect(payload) : payload.blobs;
  const s = selection.value;
  const sides = payload.sides.map((side) => (side.packed || side.count ? { name: side.name, packed: side.packed, count: side.count } : side));
  const kept = { ...payload, sides, live: false, view: toHash(s), blobs };
  return JSON.stringify(kept).replace(/</g, "\\u003c");
}

async function page() {
  const text = await held();
  const html = recording.value.payload.live ? await (await fetch("./")).text() : source;
  const slot = /(<script type="application\/json" id="regard-payload">)[^<]*(<\/script>)/;
  if (!slot.test(html)) throw new Error("the page has no place for its recording");
  return html.replace(slot, (_, start, end) => start + text + end);
}

async function collect(payload) {
  const s = selection.value;
  const keys = [];
  payload.attentions.forEach((attention, index) => {
    keys.push(`thumbs/${index}`, ...(attention.measures?.length ? [`measures/${index}`] : []));
    if (attention.long) return void keys.push(...heldKeys().filter((key) => key.split("/")[1] === String(index) && !key.startsWith("thumbs")));
    const [queries, others] = [attention.query_side, attention.key_side].map((side) => payload.sides[side].tokens.length);
    const all = attention.num_heads * attention.layers.length * queries * others * 4 <= LARGEST;
    for (const layer of attention.layers) {
      const front = index === s.attention && layer === s.layer;
      if (all || front) keys.push(...["weights", "q", "k", "lse", "norms"].map((n) => `${n}/${index}/${layer}`));
    }
  });
  const blobs = {};
  for (const key of keys) {
    const raw = await rawBlob(key);
    if (raw) blobs[key] = { shape: raw.shape, dtype: raw.dtype, data: toBase64(await gzip(raw.bytes)) };
  }
  return blobs;
}

// This view as numbers.
export function view() {
  const [r, s] = [recording.value, selection.value];
  const attention = r.attention(s.attention);
  const names = (side) => r.units(side, s.unit).map((unit) => unit.text);
  const askers = s.pins.length ? s.pins : s.word === null ? [] : [{ side: s.side, word: s.word }];
  return {
    format: "regard-view/1",
    model: r.payload.model,
    text: r.payload.text,
    attention: attention.label,
    unit: s.unit,
    mode: s.mode,
    address: toHash(s),
    queries: names(attention.query_side),
    keys: names(attention.key_side),
    heads: drawnHeads(s).map(([layer, head]) => {
      const map = !r.long(s.attention) && r.map(s.attention, layer, head, s.unit, howOf(s));
      return {
        layer,
        head,
        weights: map ? Array.from({ length: map.rows }, (_, row) => [...map.data.subarray(row * map.cols, (row + 1) * map.cols)]) : null,
        links: askers.map((asker) => ({
          word: r.units(asker.side, s.unit)[asker.word].text,
          index: asker.word,
          links: linksOf(r, s, { ...asker, layer, head })?.all.map(({ text, from, to, weight }) => ({ text, from, to, weight })),
        })),
      };
    }),
  };
}

export async function copy() {
  const front = frontOf(recording.value, selection.value, null);
  if (!front?.links) return;
  const rows = front.links.all.map((link) => `${link.text}\t${link.weight}`).join("\n");
  try {
    await navigator.clipboard.writeText(rows);
    say(`Copied ${front.links.all.length} numbers.`);
  } catch {
    say("The browser did not allow copying. Save as JSON instead.");
  }
}
