// Which attribution to trust on this input: areas of removing and of putting back, beside random orders. -> display list

import { cut, shownText } from "../core/text.js";
import { number, percent, quote } from "../core/words.js";
import { Column } from "./column.js";

const CONTROLS = ["random", "uniform"];
const STRONGEST = 8;

// Better or worse than every random order, or within them. Removing: less is better; putting back: more is.
function verdict(value, [low, high], less) {
  if (value >= low && value <= high) return "within random";
  return value < low === less ? "better than random" : "worse than random";
}

const named = (one, random) => ({ ...one, removing: verdict(one.deletion, random.deletion_range, true), adding: verdict(one.insertion, random.insertion_range, false) });

function readings(answer) {
  const random = answer.attributions.find((one) => one.name === "random");
  return { random, rest: answer.attributions.filter((one) => one !== random).map((one) => named(one, random)) };
}

// One sentence for eyes and ears.
export function trustSaid(answer) {
  const { rest } = readings(answer);
  const better = (how) => rest.filter((one) => one[how] === "better than random" && !CONTROLS.includes(one.name)).map((one) => one.name);
  const list = (names) => (names.length ? names.join(", ") : "none");
  return `${quote(shownText(answer.target_text.trim()))}: ${percent(answer.probability)} with every token, ${percent(answer.without_any)} without any. Better than every random order: removing, ${list(better("removing"))}; putting back, ${list(better("adding"))}.`;
}

// picked: the attribution whose scores are listed; tokens: the texts of the side that is read
export function trustView(answer, { width, measure, picked, tokens }) {
  const column = new Column(width, measure);
  const { random, rest } = readings(answer);
  const all = [...rest, random].flatMap((one) => [one.deletion, one.insertion]);
  const most = Math.max(1e-9, random.deletion_range[1], random.insertion_range[1], ...all);
  const left = 88;
  const room = width - left - 64;
  const x = (value) => left + (room * value) / most;
  const bar = (name, label, value, [low, high]) => {
    const { y } = column;
    column.add(
      { t: "rect", x: x(low), y, w: Math.max(1, x(high) - x(low)), h: 16, fill: "faint", opacity: 1 },
      { t: "text", x: 8, y: y + 12, text: label, size: 12.5, fill: "soft", anchor: "start" },
      { t: "rect", x: left, y: y + 5, w: Math.max(0.5, x(value) - left), h: 6, fill: CONTROLS.includes(name) ? "soft" : "accent", opacity: 1 },
      { t: "text", x: width, y: y + 12, text: number(value), size: 13, fill: "ink", anchor: "end", tabular: true },
    );
    column.y += 18;
  };
  column.text(`Mean probability of the answer while tokens are taken away as keys from every head (removing: less is better) and put back (more is better), highest score first. The grey band is what random orders give.`, { fill: "soft", size: 12.5 }).gap(8);
  for (const one of [...rest, random]) {
    const { name, scores } = one;
    const note = one === random ? "the grey band’s mean" : one.removing === one.adding ? one.removing : `removing ${one.removing}, putting back ${one.adding}`;
    const title = name === "uniform" ? "uniform (reading order)" : name;
    if (scores) {
      const pressed = picked === name;
      const inside = [{ t: "text", x: 0, y: 16, text: title, size: 14, fill: "ink", weight: pressed ? 600 : 400, anchor: "start" }];
      column.add({ t: "button", key: `trust${name}`, kind: "row", x: 0, y: column.y, w: width, h: 24, name: `${title}: scores of the tokens`, pressed, tab: true, action: { type: "trust", name }, data: { attribution: name }, items: inside });
    } else column.add({ t: "text", x: 0, y: column.y + 16, text: title, size: 14, fill: "ink", anchor: "start" });
    const after = measure(title, 14, 600) + 12;
    const beside = after + measure(note, 12.5, 400) <= width;
    column.add({ t: "text", x: beside ? width : 8, y: column.y + (beside ? 16 : 36), text: note, size: 12.5, fill: "soft", anchor: beside ? "end" : "start" });
    column.y += beside ? 24 : 44;
    bar(name, "removing", one.deletion, random.deletion_range);
    bar(name, "putting back", one.insertion, random.insertion_range);
    column.gap(4);
    if (scores && picked === name) strongest(column, answer, scores, tokens);
  }
  return column.list();
}

function strongest(column, { candidates }, scores, tokens) {
  const { width, measure } = column;
  const order = [...scores.keys()].sort((a, b) => Math.abs(scores[b]) - Math.abs(scores[a])).slice(0, STRONGEST);
  const most = Math.abs(scores[order[0]]) || 1;
  const room = width - 88 - 64;
  for (const at of order) {
    const value = scores[at];
    column.add(
      { t: "text", x: 16, y: column.y + 15, text: cut(shownText(tokens[candidates[at]] ?? ""), 68, 13, measure), size: 13, fill: "ink", anchor: "start" },
      { t: "rect", x: 88, y: column.y + 7, w: Math.max(0.5, (room * Math.abs(value)) / most), h: 8, fill: value < 0 ? "warn" : "ink", opacity: 1 },
      { t: "text", x: width, y: column.y + 15, text: number(value), size: 13, fill: "ink", anchor: "end", tabular: true },
    );
    column.y += 20;
  }
  if (order.some((at) => scores[at] < 0)) column.text("Below zero: the answer is likelier without it.", { fill: "soft", size: 12.5 });
  column.gap(8);
}
