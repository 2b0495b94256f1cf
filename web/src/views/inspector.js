// The inspector: in words and numbers what the eye sees, and how one number came about. (recording, selection) -> display list

import { dash, hue } from "../core/colour.js";
import { linksOf, restPercent, strongest, sumLine } from "../core/links.js";
import { drawnHeads } from "../core/selection.js";
import { cut, shownText } from "../core/text.js";
import { percent, plural, quote } from "../core/words.js";
import { Column } from "./column.js";
import { originSteps } from "./origin.js";

const ROW = 28;
const PLACES = { "layer-mean": "mean of the layer", "layer-max": "largest of the layer", "all-mean": "mean of all heads", "all-max": "largest of all heads" };

// The word that the inspector speaks of, and the far end of its pair.
export function frontOf(recording, selection, hover) {
  const span = selection.pins.find((pin) => pin.side === selection.side && pin.word === selection.word);
  const front = hover ?? (selection.word === null ? null : { side: selection.side, word: selection.word, last: span?.last });
  if (!front || !recording.units(front.side, selection.unit)[front.word]) return null;
  const links = linksOf(recording, selection, { ...front, layer: selection.layer, head: selection.head });
  if (!links) return { ...front, links, target: null };
  const chosen = selection.target !== null && !hover ? links.all.find((link) => link.unit === selection.target) : null;
  return { ...front, links, target: chosen ?? links.shown[0] ?? null };
}

export function inspectorView(recording, selection, { width, measure, hover = null }) {
  const column = new Column(width, measure);
  const front = frontOf(recording, selection, hover);
  const place = PLACES[selection.over] ?? `layer ${selection.layer} head ${selection.head}`;
  if (!front) return nothingChosen(column, recording, selection, place).list();
  const name = nameOf(recording, selection, front);
  if (!front.links) {
    const missing = front.links === null;
    column.text(name, { size: 17, weight: 600, heading: 2 });
    return column.text(missing ? `The weights of layer ${selection.layer} are not in this file. Choose another head.` : `Reading layer ${selection.layer} …`, { fill: "soft" }).list();
  }
  const asks = front.links.direction === "to" ? "looks at" : "is looked at by";
  heading(column, name, asks, selection.heads.length ? `${drawnHeads(selection).length} heads` : place);
  if (selection.heads.length) {
    const series = drawnHeads(selection).map(([layer, head]) => ({ name: `layer ${layer} head ${head}`, links: linksOf(recording, selection, { ...front, layer, head }) }));
    return several(column, series, front.links.direction).list();
  }
  if (selection.pins.length > 1 && !hover) {
    const { layer, head } = selection;
    const series = selection.pins.map((pin) => ({ name: nameOf(recording, selection, pin), links: linksOf(recording, selection, { ...pin, layer, head }) }));
    several(column, series, front.links.direction).rule();
    column.text(name, { size: 15, weight: 600, heading: 3 }).gap(4);
  }

  const barLeft = Math.min(120, Math.max(56, ...front.links.shown.map((link) => measure(shownText(link.text), 15, 400) + 12)));
  const rows = [];
  front.links.shown.forEach((link) => rows.push(row(column, link, { barLeft, front, measure })));
  column.add({ t: "group", key: "links", role: "group", name: `${name} ${asks}`, items: rows });
  rest(column, front.links);
  column.rule();

  const target = front.target;
  if (selection.over || selection.bare || front.last > front.word)
    return column.text("These are weights put together. Show this head alone, sinks and one word, to see how a number came about.", { fill: "soft" }).list();
  if (target && target.weight > 0) {
    const [from, to] = ends(recording, selection, front, target);
    const y = column.y + 2;
    column.add({
      t: "button",
      key: "origin",
      kind: "plain",
      x: 0,
      y,
      w: width,
      h: ROW,
      name: `how ${percent(target.weight)} came about`,
      expanded: selection.origin,
      tab: true,
      action: { type: "origin" },
      items: [
        { t: "text", x: 2, y: 19, text: selection.origin ? "▾" : "▸", size: 13, fill: "soft", anchor: "start", quiet: true },
        { t: "text", x: 18, y: 19, text: `how ${percent(target.weight)} came about`, size: 14, fill: "ink", weight: 600, anchor: "start" },
      ],
    });
    column.y = y + ROW;
    if (selection.origin) {
      column.text(`${quote(from)} → ${quote(to)}, ${place}`, { fill: "soft" });
      originSteps(column, recording, selection, target.from, target.to);
    }
  }
  return column.gap(8).list();
}

function ends(recording, selection, front, target) {
  const attention = recording.attention(selection.attention);
  const text = (side, at) => shownText(recording.units(side, selection.unit)[at].text);
  return [text(attention.query_side, target.from), text(attention.key_side, target.to)];
}

function heading(column, name, asks, place) {
  const { width, measure } = column;
  column.y += 24;
  const right = measure(place, 13, 400);
  const shown = cut(name, width - right - measure(asks, 15, 400) - 24, 17, measure, 600);
  column.add(
    { t: "text", x: 0, y: column.y - 5, text: shown, size: 17, fill: "ink", weight: 600, anchor: "start", heading: 2 },
    { t: "text", x: measure(shown, 17, 600) + 8, y: column.y - 5, text: asks, size: 15, fill: "soft", anchor: "start" },
    { t: "text", x: width, y: column.y - 5, text: place, size: 13, fill: "soft", anchor: "end", tabular: true },
  );
  column.gap(8);
}

function row(column, link, { barLeft, front, measure }) {
  const { width } = column;
  const chosen = front.target && front.target.unit === link.unit;
  const text = cut(shownText(link.text), barLeft - 8, 15, measure);
  const value = percent(link.weight);
  const role = link.role;
  const barRight = width - 52 - (role ? measure(role, 12, 400) + 8 : 0);
  const full = width - 52 - barLeft;
  const item = {
    t: "button",
    key: `link${link.unit}`,
    kind: "row",
    x: 0,
    y: column.y,
    w: width,
    h: ROW,
    name: `${link.text} ${role ? `${role} ` : ""}${value}`,
    pressed: Boolean(chosen),
    tab: true,
    action: { type: "target", unit: link.unit },
    data: { unit: link.unit, weight: link.weight },
    items: [
      ...(chosen ? [{ t: "rect", x: -6, y: 4, w: 2, h: 20, r: 0, fill: "accent", opacity: 1 }] : []),
      { t: "text", x: 0, y: 19, text, size: 15, fill: link.role ? "soft" : "ink", anchor: "start" },
      { t: "rect", x: barLeft, y: 8, w: Math.max(1, Math.min(full * link.weight, barRight - barLeft)), h: 12, r: 0, fill: "accent", opacity: Math.round((0.35 + 0.65 * link.weight) * 100) / 100 },
      ...(role ? [{ t: "text", x: width - 52, y: 19, text: role, size: 12, fill: "soft", anchor: "end" }] : []),
      { t: "text", x: width, y: 19, text: value, size: 15, fill: "ink", anchor: "end", tabular: true, weight: chosen ? 600 : 400 },
    ],
  };
  column.y += ROW;
  return item;
}

function rest(column, links) {
  const { width } = column;
  const soft = { size: 13, fill: "soft" };
  if (links.rest.count) {
    column.y += 24;
    column.add(
      { t: "text", x: 0, y: column.y - 7, text: `… ${plural(links.rest.count, "other")}`, ...soft, anchor: "start" },
      { t: "text", x: width, y: column.y - 7, text: restPercent(links), ...soft, anchor: "end", tabular: true },
    );
  }
  if (links.unseen && links.direction === "to" && !links.empty) {
    column.y += 22;
    column.add({ t: "text", x: 0, y: column.y - 6, text: `${plural(links.unseen, "word")} it cannot see`, ...soft, anchor: "start" });
    column.add({ t: "text", x: width, y: column.y - 6, text: "0 %", ...soft, anchor: "end", tabular: true });
  }
  const sum = sumLine(links);
  if (links.direction === "to") {
    column.y += 24;
    column.add({ t: "text", x: width, y: column.y - 6, text: sum, size: 14, fill: "ink", weight: 600, anchor: "end", tabular: true });
  } else column.gap(4).text(sum, { fill: "soft", size: 12.5 });
}

function nothingChosen(column, recording, selection, place) {
  column.text(place, { size: 17, weight: 600, heading: 2 });
  const best = strongest(recording, selection);
  if (best === null || best === undefined) return column.text("The weights of this layer are not here yet.", { fill: "soft" });
  if (!best.length) return column.text("Choose a word to see what it looks at.", { fill: "soft" });
  column.text("Choose a word to see what it looks at. The strongest links in this head, special tokens and sinks left out:", { fill: "soft" }).gap(6);
  const { query_side } = recording.attention(selection.attention);
  const rows = best.map((link) => {
    const value = percent(link.weight);
    const text = `${shownText(link.fromText)} → ${shownText(link.toText)}`;
    const item = {
      t: "button", key: `best${link.from}.${link.to}`, kind: "row", x: 0, y: column.y, w: column.width, h: ROW, name: `${text} ${value}`, tab: true,
      action: { type: "pair", side: query_side, word: link.from, unit: link.to },
      items: [
        { t: "text", x: 0, y: 19, text: cut(text, column.width - 64, 15, column.measure), size: 15, fill: "ink", anchor: "start" },
        { t: "text", x: column.width, y: 19, text: value, size: 15, fill: "ink", anchor: "end", tabular: true },
      ],
    };
    column.y += ROW;
    return item;
  });
  return column.add({ t: "group", key: "best", role: "group", name: "strongest links", items: rows });
}

const nameOf = (recording, selection, { side, word, last }) => {
  const units = recording.units(side, selection.unit);
  return last > word ? units.slice(word, last + 1).map((unit) => shownText(unit.text)).join(" ") : shownText(units[word].text);
};

// Several heads, or several pins: for each word that any of them looks at, one bar each.
function several(column, series, direction) {
  const { width, measure } = column;
  const all = series.map(({ links }) => links);
  series.forEach(({ name, links }, i) => {
    const sum = links && direction === "to" ? sumLine(links) : "";
    column.y += 20;
    column.add(
      { t: "path", d: `M0 ${column.y - 9}H28`, stroke: hue(i), width: 4, dash: dash(i), opacity: 1 },
      { t: "text", x: 36, y: column.y - 5, text: cut(`${i + 1}: ${name}`, width - 44 - measure(sum, 12, 400), 13, measure), size: 13, fill: "ink", anchor: "start", tabular: true },
      { t: "text", x: width, y: column.y - 5, text: sum, size: 12, fill: "soft", anchor: "end", tabular: true },
    );
  });
  column.rule();
  const best = new Map();
  all.forEach((links) => links?.shown.forEach((link) => best.set(link.unit, Math.max(best.get(link.unit) ?? 0, link.weight))));
  const units = [...best.keys()].sort((a, b) => best.get(b) - best.get(a)).slice(0, 8);
  for (const unit of units) {
    const links = all.map((one) => one?.all.find((link) => link.unit === unit));
    const { text, role } = links.find(Boolean);
    column.y += 20;
    column.add({ t: "text", x: 0, y: column.y - 5, text: cut(shownText(text) + (role ? `  ${role}` : ""), width, 15, measure), size: 15, fill: "ink", anchor: "start" });
    links.forEach((link, i) => {
      if (!link) return;
      const y = column.y;
      column.add(
        { t: "text", x: 0, y: y + 12, text: String(i + 1), size: 12, fill: "soft", anchor: "start", tabular: true },
        { t: "rect", x: 16, y: y + 4, w: Math.max(0.5, (width - 72) * link.weight), h: 8, r: 0, fill: hue(i), opacity: 1 },
        { t: "text", x: width, y: y + 12, text: percent(link.weight), size: 12, fill: "ink", anchor: "end", tabular: true },
      );
      column.y += 16;
    });
    column.gap(6);
  }
  return column.gap(8);
}

// The same, as one sentence for people who listen: the top three links.
export function spoken(recording, selection) {
  const front = frontOf(recording, selection, null);
  if (!front || !front.links) return `layer ${selection.layer} head ${selection.head}`;
  const name = recording.units(front.side, selection.unit)[front.word].text;
  const place = `layer ${selection.layer} head ${selection.head}`;
  const asks = front.links.direction === "to" ? "looks at" : "is looked at by";
  if (front.links.empty) return `${place}: ${name} ${asks} nothing`;
  const best = front.links.shown.slice(0, 3).map((link) => `${link.text} ${percent(link.weight)}${link.role ? ` (${link.role})` : ""}`);
  return `${place}: ${name} ${asks} ${best.join(", ")}`;
}
