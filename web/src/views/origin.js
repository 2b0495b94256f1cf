// How one number came about, step by step, with its equation in words and its real numbers. -> items in a column

import { originOf } from "../core/origin.js";
import { exact, number, percent, plural, quote } from "../core/words.js";
import { shownText } from "../core/text.js";

export function originSteps(column, recording, selection, from, to) {
  const o = originOf(recording, selection, from, to);
  if (o.state !== "ready") {
    const text =
      o.state === "loading"
        ? `Reading q and k of layer ${selection.layer} …`
        : `This file holds no q and k for layer ${selection.layer}, so the steps cannot be shown. Open the text with regard look to see them.`;
    return column.gap(4).text(text, { fill: "soft" });
  }
  const [query, key] = [quote(shownText(o.query.text)), quote(shownText(o.key.text))];
  const small = { fill: "soft", size: 12.5 };
  const step = (n, title) => column.gap(14).text(`${n}  ${title}`, { weight: 600, heading: 3 });
  let n = 1;

  if (o.query.of.tokens[1] - o.query.of.tokens[0] > 1 || o.key.of.tokens[1] - o.key.of.tokens[0] > 1)
    column.gap(8).text(
      `A word of several pieces: its row is the mean over its pieces, its column their sum. Shown is the strongest pair of pieces, ${query} and ${key}.`,
      small,
    );

  const strong = strongest(o.products, 3);
  step(n++, `q · k = ${number(o.dot)}`);
  column.text(`${query} asks with q, ${key} answers with k: ${plural(o.dim, "number")} each. Multiply them dimension by dimension, then add.`, small).gap(6);
  column.bars(o.q, { label: "q", chosen: strong }).bars(o.k, { label: "k", chosen: strong }).bars(o.products, { label: "q·k", height: 36, chosen: strong });
  column.text(`Most of it: ${[...strong].map((d) => `dimension ${d} gives ${number(o.products[d])}`).join(", ")}.`, small);
  if (o.groupSize > 1) column.text(`${plural(o.groupSize, "head")} share this k: key group ${o.group}.`, small);

  step(n++, `× scale = ${number(o.scaled)}`);
  const root = Math.abs(o.scale * Math.sqrt(o.dim) - 1) < 1e-4 ? `, which is 1 / √${o.dim}` : "";
  column.text(`${number(o.dot)} × ${number(o.scale)}${root}. It keeps scores the same size for any number of dimensions.`, small);

  if (o.cap) {
    step(n++, `cap → ${number(o.capped)}`);
    column.text(`${number(o.cap)} × tanh(${number(o.scaled)} / ${number(o.cap)}): no score may pass ± ${number(o.cap)}.`, small);
  }
  if (o.hasBias) {
    step(n++, `+ bias = ${number(o.score)}`);
    const sign = o.bias < 0 ? `− ${number(-o.bias)}` : `+ ${number(o.bias)}`;
    column.text(`${number(o.capped)} ${sign}: what the model adds for where the two stand${o.readBack ? " (read back from the weight)" : ""}.`, small);
  }

  step(n++, `score ${number(o.score)}, among all ${o.keyCount}`);
  const hidden = o.scores.filter((s) => s === -Infinity).length;
  column.text(`The scores of ${query} with every token${hidden ? `; ${hidden} masked, they take no part` : ""}.`, small).gap(6);
  column.bars(o.scores, { height: 36, chosen: o.key.token });

  const total = o.total > 0.9995 ? "Now the row adds up to 1." : `The row adds up to ${o.total.toFixed(2)}; the sink takes the rest.`;
  step(n++, `softmax → ${exact(o.computed)}`);
  column.text(`exp(${number(o.score)}) / sum of exp of all scores = exp(${number(o.score)} − ${number(o.lse)}) = ${exact(o.computed)}. ${total}`, small).gap(6);
  column.bars(o.weights, { height: 36, chosen: o.key.token, signed: false });
  if (Math.abs(o.computed - o.weight) > 5e-4) column.text(`The recording says ${exact(o.weight)}.`, small);

  if (o.norm !== null) {
    step(n++, `× value: ${exact(o.weight)} × ${number(o.norm)} = ${number(o.weight * o.norm)}`);
    column.text(`The weight says how much of ${key}’s value is taken; that value is ${number(o.norm)} long. Of all that ${query} takes in here, measured so, this is ${percent(o.share)}.`, small).gap(6);
    column.bars(o.carried, { height: 36, chosen: o.key.token, signed: false });
    if (o.value) column.bars(o.value.v, { label: "v" }).bars(o.value.carried, { label: "w·v", like: o.value.v });
    else if (o.waits) column.text("Reading the values …", small);
  }
  if (o.value) {
    const length = Math.hypot(...o.value.out);
    step(n++, `sum of weight × value → ${number(length)} long`);
    column.text(`What this head gives to ${query}: weight × value of all ${plural(o.keyCount, "token")}, added up, ${plural(o.value.out.length, "number")}. The model’s own row${o.value.off < 1e-4 ? " is the same" : ""} to within ${number(o.value.off)}.`, small).gap(6);
    column.bars(o.value.out, { label: "out", height: 36 });
  }
  return column;
}

// The dimensions whose products speak most for the match.
function strongest(products, count) {
  const order = [...products.keys()].sort((a, b) => Math.abs(products[b]) - Math.abs(products[a]));
  return new Set(order.slice(0, count));
}
