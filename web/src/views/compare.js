// Two texts side by side in one head: each map between the words both have, and their difference. (answer) -> display list

import { cut, shownText } from "../core/text.js";
import { percent } from "../core/words.js";
import { Column } from "./column.js";

const STEPS = 12;

export function compareView(answer, { width, measure, names }) {
  const { words, first, second } = answer;
  const gutter = Math.min(80, Math.max(...words.map((word) => measure(shownText(word), 11, 400))) + 8);
  const across = width >= 560 ? 3 : 1;
  const room = Math.floor((width - 24 * (across - 1)) / across);
  const size = Math.max(1, Math.min(28, Math.floor(((Math.min(room, 420) - gutter) / words.length) * 10) / 10));
  const labelled = size >= 10;
  const edge = labelled ? Math.ceil(gutter) : 4;
  const span = size * words.length;
  const most = Math.max(1e-9, ...first.flat(), ...second.flat());
  const items = [];
  const panel = (title, index, paint) => {
    const x = (index % across) * (room + 24);
    const y = Math.floor(index / across) * (span + edge + 44);
    items.push({ t: "text", x, y: y + 14, text: cut(title, room, 13, measure, 600), size: 13, fill: "ink", weight: 600, anchor: "start", heading: 2 });
    const [left, top] = [x + edge, y + 24 + edge];
    if (labelled)
      words.forEach((word, i) => {
        const text = cut(shownText(word), gutter - 6, 11, measure);
        items.push({ t: "text", x: left - 5, y: top + size * (i + 0.5) + 4, text, size: 11, fill: "soft", anchor: "end" });
        items.push({ t: "text", x: left + size * (i + 0.5) + 4, y: top - 5, text, size: 11, fill: "soft", anchor: "start", turn: true });
      });
    items.push(...paint(left, top), { t: "path", d: `M${left} ${top}h${span}v${span}h${-span}Z`, stroke: "faint", width: 1, opacity: 1 });
    return y + 24 + edge + span;
  };
  const heat = (values, name) => (x, y) => [{ t: "heat", key: name, x, y, w: span, h: span, rows: words.length, cols: words.length, values: Float64Array.from(values.flat()), max: most, name }];
  panel(names[0], 0, heat(first, "first map"));
  panel(names[1], 1, heat(second, "second map"));
  const change = words.map((_, r) => words.map((__, c) => second[r][c] - first[r][c]));
  const far = Math.max(1e-9, ...change.flat().map(Math.abs));
  let y = panel("second − first", 2, (x, top) => difference(change, far, x, top, size)) + 24;

  const column = new Column(width, measure);
  column.y = y;
  column.text(`Blue: more in the first. Orange: more in the second. Full colour is ${percent(far)}.`, { fill: "soft" });
  const alone = [answer.only_first, answer.only_second].map((own) => own.map(shownText).join(" "));
  if (alone[0] || alone[1]) column.text(`Left out, because only one text has them: ${[alone[0] && `first: ${alone[0]}`, alone[1] && `second: ${alone[1]}`].filter(Boolean).join("; ")}.`, { fill: "soft" });
  column.gap(8).text("What changes most", { size: 15, weight: 600, heading: 2 }).gap(2);
  const order = change.flatMap((row, r) => row.map((value, c) => ({ r, c, value }))).sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  for (const { r, c } of order.slice(0, 8)) {
    column.y += 22;
    column.add(
      { t: "text", x: 0, y: column.y - 6, text: cut(`${shownText(words[r])} → ${shownText(words[c])}`, 220, 14, measure), size: 14, fill: "ink", anchor: "start" },
      { t: "text", x: Math.min(width, 360), y: column.y - 6, text: `${percent(first[r][c])} → ${percent(second[r][c])}`, size: 14, fill: "ink", anchor: "end", tabular: true },
    );
  }
  column.gap(8);
  return { width, height: column.y, items: [...items, ...column.items] };
}

// Cells of equal sign and size as one path, so that a picture stays small.
function difference(change, far, left, top, size) {
  const paths = new Map();
  change.forEach((row, r) =>
    row.forEach((value, c) => {
      const step = Math.round((STEPS * Math.abs(value)) / far);
      if (!step) return;
      const key = `${value > 0 ? "hue1" : "hue0"}/${step}`;
      const d = `M${fix(left + c * size)} ${fix(top + r * size)}h${size}v${size}h${-size}Z`;
      paths.set(key, (paths.get(key) ?? "") + d);
    }),
  );
  return [...paths].map(([key, d]) => ({ t: "path", key: `change${key}`, d, fill: key.split("/")[0], opacity: Math.round((100 * key.split("/")[1]) / STEPS) / 100, data: { change: key } }));
}

const fix = (value) => Math.round(value * 100) / 100;
