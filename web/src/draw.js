// The page's own drawing for a plain JavaScript engine: regardDraw(payload, blobs, options) -> SVG text. No DOM, no network.

import { fromBase64, toArray } from "./core/blob.js";
import { createRecording } from "./core/recording.js";
import { fromHash, initialSelection } from "./core/selection.js";
import { tableMeasure } from "./core/measure.js";
import { figureView } from "./views/figure.js";
import { spoken } from "./views/inspector.js";
import { toSvg } from "./paint/svg.js";

// payloadJson: the page's payload. blobsJson: {key: {shape, dtype, data: base64 of raw bytes}}.
// optionsJson: {width: px = 1280, theme: "light" | "dark", view: an address as in the page, "#l=5&h=11&w=0.7", or null}
globalThis.regardDraw = function regardDraw(payloadJson, blobsJson, optionsJson) {
  const payload = JSON.parse(payloadJson);
  const blobs = JSON.parse(blobsJson || "{}");
  const options = JSON.parse(optionsJson || "{}");
  const read = new Map();
  const get = (key) => {
    if (!(key in blobs)) return null;
    if (!read.has(key)) read.set(key, toArray(fromBase64(blobs[key].data), blobs[key].shape, blobs[key].dtype));
    return read.get(key);
  };
  const recording = createRecording(payload, get);
  const selection = options.view ? fromHash(options.view, recording) : initialSelection(payload);
  const list = figureView(recording, selection, { width: options.width || 1280, measure: tableMeasure });
  const title = `${payload.text}. ${spoken(recording, selection)}`;
  const svg = toSvg(list, { theme: options.theme === "dark" ? "dark" : "light", title });
  return [svg, "\n"].join(""); // one flat string: quickjs hands out no string that is still a rope
};
