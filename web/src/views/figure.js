// The whole picture for ⇩ and --save: title, sentence (or map), heads and inspector, side by side as on the page.

import { mapView } from "./map.js";
import { headsView } from "./heads.js";
import { inspectorView } from "./inspector.js";
import { sentenceView } from "./sentence.js";
import { cut } from "../core/text.js";

const EDGE = 24;

export function figureView(recording, selection, { width = 1280, measure }) {
  const { payload } = recording;
  const attention = recording.attention(selection.attention);
  const narrow = width < 720;
  const inner = width - 2 * EDGE;
  const items = [];
  const put = (key, list, x, y) => items.push({ t: "group", key, x, y, name: key, role: "group", items: list.items });

  const facts = `${attention.label} · layer ${selection.layer} head ${selection.head} · exact`;
  const title = `${payload.model.name} · ${payload.model.num_layers} × ${payload.model.num_heads} heads`;
  items.push({ t: "text", x: EDGE, y: 34, text: "regard", size: 17, fill: "ink", weight: 600, anchor: "start" });
  items.push({ t: "text", x: EDGE + 72, y: 34, text: cut(narrow ? title : `${title} · ${facts}`, inner - 72, 13, measure), size: 13, fill: "soft", anchor: "start" });
  if (narrow) items.push({ t: "text", x: EDGE, y: 54, text: cut(facts, inner, 13, measure), size: 13, fill: "soft", anchor: "start" });
  const top = narrow ? 68 : 52;
  items.push({ t: "path", d: `M0 ${top}H${width}`, stroke: "faint", width: 1, opacity: 1 });

  const heads = headsView(recording, { ...selection, sort: "position" });
  const side = narrow ? inner : 288;
  const grid = !narrow && heads.width <= 360 && width >= 1100 ? heads.width + 20 : 0;
  const middle = narrow ? inner : inner - side - 20 - grid;
  let y = top + 16;
  const sentence = sentenceView(recording, selection, { width: middle, measure, compact: narrow });
  put("sentence", sentence, EDGE + grid, y);
  let bottom = y + sentence.height;
  if (selection.view === "map") {
    const map = mapView(recording, selection, { width: middle, measure });
    put("map", map, EDGE + grid, bottom + 8);
    bottom += 8 + map.height;
  }
  if (grid) {
    put("heads", heads, EDGE, y);
    bottom = Math.max(bottom, y + heads.height);
  }
  const inspector = inspectorView(recording, selection, { width: side, measure });
  const at = narrow ? [EDGE, bottom + 16] : [width - EDGE - side, y];
  put("inspector", inspector, ...at);
  bottom = Math.max(bottom, at[1] + inspector.height);
  return { width, height: Math.ceil(bottom + EDGE), items };
}
