// A column being written from top to bottom: paragraphs, rules and rows of bars, as display-list items.

import { wrap } from "../core/text.js";

export class Column {
  constructor(width, measure) {
    Object.assign(this, { width, measure, y: 0, items: [] });
  }

  add(...items) {
    this.items.push(...items);
    return this;
  }

  gap(px) {
    this.y += px;
    return this;
  }

  // A paragraph; heading: its level, 0 for none.
  text(text, { size = 13, fill = "ink", weight = 400, lead = 1.45, x = 0, heading = 0 } = {}) {
    for (const line of wrap(text, this.width - x, size, this.measure, weight)) {
      this.y += Math.round(size * lead);
      this.items.push({ t: "text", x, y: this.y - Math.round(size * 0.3), text: line, size, fill, weight, anchor: "start", heading });
    }
    return this;
  }

  rule() {
    this.y += 10;
    this.items.push({ t: "path", d: `M0 ${this.y}H${this.width}`, stroke: "faint", width: 1, opacity: 1 });
    this.y += 6;
    return this;
  }

  // Bars around a zero line; chosen: the index drawn in the accent; like: values whose scale they share. NaN and −inf
  // leave a gap.
  bars(values, { height = 28, chosen = null, fill = "soft", label = "", signed = true, like = [] } = {}) {
    const left = label ? 28 : 0;
    const width = this.width - left;
    if (values.length > 2 * width) [values, chosen] = binned(values, Math.floor(width), chosen);
    const finite = [...values, ...like].filter((v) => Number.isFinite(v));
    const top = Math.max(0, ...finite);
    const bottom = signed ? Math.min(0, ...finite) : 0;
    const span = top - bottom || 1;
    const zero = this.y + (height * top) / span;
    const step = width / values.length;
    const gap = step > 4 ? 1 : step > 2 ? 0.5 : 0;
    const [rest, front] = ["", ""].map(() => []);
    values.forEach((value, i) => {
      if (!Number.isFinite(value) || value === 0) return;
      const y = value > 0 ? zero - (height * value) / span : zero;
      const h = (height * Math.abs(value)) / span;
      const [x, w] = [left + i * step, Math.max(0.4, step - gap)];
      const d = `M${r(x)} ${r(y)}h${r(w)}v${r(Math.max(h, 0.3))}h${r(-w)}Z`;
      (chosen !== null && (chosen.has ? chosen.has(i) : chosen === i) ? front : rest).push(d);
    });
    if (label) this.items.push({ t: "text", x: 0, y: this.y + height / 2 + 4, text: label, size: 13, fill: "ink", weight: 600, anchor: "start" });
    this.items.push({ t: "path", d: `M${left} ${r(zero)}H${this.width}`, stroke: "faint", width: 1, opacity: 1 });
    if (rest.length) this.items.push({ t: "path", d: rest.join(""), fill, opacity: 1 });
    if (front.length) this.items.push({ t: "path", d: front.join(""), fill: "accent", opacity: 1 });
    this.y += height + 4;
    return this;
  }

  list() {
    return { width: this.width, height: this.y, items: this.items };
  }
}

// Many values as one bar a pixel: the farthest from zero of those that stand there.
function binned(values, count, chosen) {
  const out = new Float64Array(count).fill(-Infinity);
  const bin = (i) => Math.floor((i * count) / values.length);
  values.forEach((value, i) => {
    const at = bin(i);
    if (Number.isFinite(value) && (out[at] === -Infinity || Math.abs(value) > Math.abs(out[at]))) out[at] = value;
  });
  return [out, typeof chosen === "number" ? bin(chosen) : chosen];
}

const r = (value) => Math.round(value * 100) / 100;
