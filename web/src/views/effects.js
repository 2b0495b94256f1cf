// Effects: what was cut, how heavy it was, and what changed, on one scale beside random cuts. (cuts) -> display list

import { number, percent, plural } from "../core/words.js";
import { cut as cutText } from "../core/text.js";
import { Column } from "./column.js";

const GAP = 16;

// What can be cut at a selection: {line, head, word} -> {name, cuts} or null. Words of several tokens are cut whole.
export function cutsAt(recording, selection, front) {
  const { attention: index, layer, head, unit } = selection;
  const { query_side, key_side } = recording.attention(index);
  const place = `layer ${layer} head ${head}`;
  const tokens = (side, word, last = word) => [recording.units(side, unit)[word].tokens[0], recording.units(side, unit)[last].tokens[1]];
  const list = ([first, end]) => Array.from({ length: end - first }, (_, i) => first + i);
  const name = (side, word) => `“${recording.units(side, unit)[word].text.trim()}”`;
  const out = { head: { name: `head ${head} of layer ${layer}`, cuts: [{ type: "head", attention: index, layer, head }] }, line: null, word: null };
  if (!front) return out;
  if (front.target) {
    const { from, to } = front.target;
    const cuts = list(tokens(query_side, from)).flatMap((query) => list(tokens(key_side, to)).map((key) => ({ type: "edge", attention: index, layer, head, query, key })));
    out.line = { name: `${name(query_side, from)} → ${name(key_side, to)} in ${place}`, cuts };
  }
  const [start, stop] = tokens(front.side, front.word, front.last ?? front.word);
  out.word = { name: `${front.last > front.word ? "the words from " : "the word "}${name(front.side, front.word)} as a key, in every head`, cuts: [{ type: "span", side: front.side, start, stop }] };
  return out;
}

// made: [{name, how, answer | error | waiting}], newest first
export function effectsView(made, { width, measure }) {
  const column = new Column(width, measure);
  if (!made.length) return column.text("Nothing is cut yet. A weight says how much of a value is taken; a cut says what changes when it is not.", { fill: "soft" }).list();
  const told = made.filter((one) => one.answer).map((one) => one.answer.effects[0]);
  const most = Math.max(1e-9, ...told.flatMap((effect) => [effect.weight, effect.size, effect.control?.high ?? 0]));
  const left = Math.min(96, width / 4);
  const room = width - left - 76;
  const bar = (name, value, fill, control) => {
    const y = column.y;
    if (control) column.add({ t: "rect", x: left + (room * control.low) / most, y, w: Math.max(1, (room * (control.high - control.low)) / most), h: 16, fill: "faint", opacity: 1 });
    column.add(
      { t: "text", x: 0, y: y + 13, text: name, size: 13, fill: "soft", anchor: "start" },
      { t: "rect", x: left, y: y + 4, w: Math.max(0.5, (room * value) / most), h: 8, fill, opacity: 1 },
      { t: "text", x: width, y: y + 13, text: name === "weight" ? percent(value) : number(value), size: 13, fill: "ink", anchor: "end", tabular: true },
    );
    column.y += 22;
  };
  for (const { name, how, answer, error } of made) {
    column.text(name, { size: 15, weight: 600, heading: 2 }).text(how, { fill: "soft" }).gap(4);
    if (error) column.text(error, { fill: "warn" });
    else if (!answer) column.text("Measuring …", { fill: "soft" });
    else {
      const effect = answer.effects[0];
      const { control } = effect;
      bar("weight", effect.weight, "accent");
      bar("effect", effect.size, "ink", control);
      const inside = control && effect.size <= control.high;
      column.text(`Effect: ${answer.measure}. ${control ? `The grey band is what ${plural(control.count, "random cut")} of about the same weight change, ${number(control.low)} to ${number(control.high)}: this cut ${inside ? "changes no more than they do" : "changes more than they do"}.` : "No random cuts to compare with."}`, { fill: "soft", size: 12.5 });
      if (answer.target && effect.before !== null) column.gap(4).text(`${answer.task === "next" ? "Next token" : "Answer"} “${answer.target.text.trim()}”: ${percent(effect.before)} before, ${percent(effect.after)} after.`);
      effect.changed.slice(0, 6).forEach((change) => {
        column.y += 20;
        column.add(
          { t: "text", x: GAP, y: column.y - 5, text: cutText(change.text.trim() || "␣", width - 170, 13, measure), size: 13, fill: "ink", anchor: "start" },
          { t: "text", x: width, y: column.y - 5, text: `${percent(change.before)} → ${percent(change.after)}`, size: 13, fill: "ink", anchor: "end", tabular: true },
        );
      });
    }
    column.rule();
  }
  return column.list();
}
