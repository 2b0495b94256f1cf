// Text on a plane: measuring, wrapping, cutting, and the flow of words as boxes.

// measure(text, size, weight) -> width in px. Cuts a text to a width with an ellipsis.
export function cut(text, width, size, measure, weight = 400) {
  if (measure(text, size, weight) <= width) return text;
  let end = text.length;
  while (end > 1 && measure(`${text.slice(0, end)}…`, size, weight) > width) end--;
  return `${text.slice(0, end)}…`;
}

export function wrap(text, width, size, measure, weight = 400) {
  const lines = [];
  let line = "";
  for (const word of text.split(" ")) {
    const longer = line ? `${line} ${word}` : word;
    if (line && measure(longer, size, weight) > width) {
      lines.push(line);
      line = word;
    } else line = longer;
  }
  lines.push(line);
  return lines;
}

export const shownText = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "␣";

// units -> boxes {x, y, w, h, row, text, size}: words set as text that wraps, subwords of one word glued together.
export function flow(units, measure, { width, size, pitch, top = 0, left = 0 }) {
  const height = Math.round(size * 1.55);
  const small = Math.round(size * 0.62);
  const pad = 4;
  const boxes = [];
  let x = 0;
  let row = 0;
  units.forEach((unit, i) => {
    const text = shownText(unit.text);
    const fontSize = unit.special ? small : size;
    const limit = width - 2 * pad;
    const shown = cut(text, limit, fontSize, measure);
    const inner = measure(shown, fontSize, 400);
    const padding = unit.joined || (units[i + 1] && units[i + 1].joined) ? 3 : pad;
    const w = Math.max(24, Math.ceil(inner) + 2 * padding);
    const gap = x === 0 ? 0 : 1;
    if (x + gap + w > width && x > 0) {
      row++;
      x = 0;
    } else x += gap;
    boxes.push({ x: left + x, y: top + row * pitch, w, h: height, row, text: shown, size: fontSize, joined: unit.joined });
    x += w;
  });
  return { boxes, rows: units.length ? row + 1 : 0, height: units.length ? row * pitch + height : 0 };
}

// units -> one box a row, for two columns on a phone
export function column(units, measure, { width, size, pitch, top = 0, left = 0, align = "left" }) {
  const height = Math.round(size * 1.55);
  const boxes = units.map((unit, i) => {
    const fontSize = unit.special ? Math.round(size * 0.7) : size;
    const text = cut(shownText(unit.text), width - 10, fontSize, measure);
    const w = Math.max(24, Math.ceil(measure(text, fontSize, 400)) + 10);
    return { x: align === "left" ? left : left + width - w, y: top + i * pitch, w, h: height, row: i, text, size: fontSize, joined: false };
  });
  return { boxes, rows: boxes.length, height: boxes.length ? (boxes.length - 1) * pitch + height : 0 };
}
