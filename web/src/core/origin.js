// How one number came about: every step from q · k to weight × |v|, with the real numbers of the recording.

import { groupOf } from "./recording.js";

// query, key: units. -> {state: "ready", ...steps} | {state: "loading"} | {state: "missing"}
export function originOf(recording, selection, query, key) {
  const { attention: index, layer, head, unit } = selection;
  const attention = recording.attention(index);
  const long = recording.long(index);
  const queries = recording.units(attention.query_side, unit)[query];
  const keys = recording.units(attention.key_side, unit)[key];
  let [i, j] = [queries.tokens[0], keys.tokens[0]];
  const names = long ? [`row/${index}/${layer}/${head}/${i}/${i + 1}`, `vectors/${index}/${layer}/${head}/${i}/${j}`] : ["weights", "q", "k"].map((name) => `${name}/${index}/${layer}`);
  const [weights, q, k] = names.map((name) => recording.get(name));
  const [lse, norms] = ["lse", "norms"].map((name) => recording.get(`${name}/${index}/${layer}`));
  const stagesOf = () => recording.get(`scores/${index}/${layer}/${head}/${i}`);
  const needed = long ? [weights, q, lse, stagesOf()] : [weights, q, k, lse];
  if (needed.some((blob) => blob === null)) return { state: "missing" };
  if (needed.some((blob) => blob === undefined)) return { state: "loading" };

  const numK = weights.shape[weights.shape.length - 1];
  const numQ = lse.shape[1];
  const weightAt = long ? (_, b) => weights.data[b] : (a, b) => weights.data[(head * numQ + a) * numK + b];
  if (!long)
    for (let a = queries.tokens[0]; a < queries.tokens[1]; a++)
      for (let b = keys.tokens[0]; b < keys.tokens[1]; b++) if (weightAt(a, b) > weightAt(i, j)) [i, j] = [a, b];

  const group = Math.floor(head / groupOf(attention));
  const dim = q.shape[q.shape.length - 1];
  const qRow = long ? q.data.subarray(0, dim) : q.data.subarray((head * numQ + i) * dim, (head * numQ + i + 1) * dim);
  const kRow = (at) => (long ? q.data.subarray(dim) : k.data.subarray((group * numK + at) * dim, (group * numK + at + 1) * dim));
  const products = Float64Array.from(qRow, (value, d) => value * kRow(j)[d]);
  const dotWith = (at) => {
    const row = kRow(at);
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += qRow[d] * row[d];
    return sum;
  };

  const weightRow = Float64Array.from({ length: numK }, (_, at) => weightAt(i, at));
  const lseValue = lse.data[head * numQ + i];
  const stages = stagesOf();
  const stage = (n) => (stages ? Float64Array.from(stages.data.subarray(n * numK, (n + 1) * numK)) : null);
  const scaled = stage(0) ?? Float64Array.from({ length: numK }, (_, at) => dotWith(at) * attention.scale);
  const cap = attention.softcap;
  const capped = stage(1) ?? (cap ? scaled.map((value) => cap * Math.tanh(value / cap)) : scaled);
  // exp(score − lse) = weight, so a saved page finds the score after the bias from the weight itself.
  const biased =
    stage(2) ??
    capped.map((value, at) => (weightRow[at] === 0 ? -Infinity : attention.has_bias ? Math.log(weightRow[at]) + lseValue : value));

  // The values that this head reads, and below them what it gave: (keys + 1) rows.
  const blob = attention.values?.includes(layer) ? recording.get(`values/${index}/${layer}/${head}/${i}`) : null;
  const size = blob ? blob.shape[1] : 0;
  const valueOf = (at) => blob.data.subarray(at * size, (at + 1) * size);
  const summed = new Float64Array(size);
  if (blob) weightRow.forEach((w, at) => valueOf(at).forEach((v, d) => (summed[d] += w * v)));
  const value = blob && { v: valueOf(j), carried: Float64Array.from(valueOf(j), (v) => v * weightRow[j]), out: valueOf(numK), off: summed.reduce((far, v, d) => Math.max(far, Math.abs(v - valueOf(numK)[d])), 0) };

  const normRow = norms ? Float64Array.from(norms.data.subarray(group * numK, (group + 1) * numK)) : null;
  const carried = normRow ? normRow.map((value, at) => value * weightRow[at]) : null;
  return {
    state: "ready",
    query: { token: i, text: recording.payload.sides[attention.query_side].tokens[i].text, of: queries },
    key: { token: j, text: recording.payload.sides[attention.key_side].tokens[j].text, of: keys },
    q: qRow,
    k: kRow(j),
    products,
    dot: dotWith(j),
    dim,
    scale: attention.scale,
    scaled: scaled[j],
    cap,
    capped: capped[j],
    hasBias: attention.has_bias,
    bias: biased[j] - capped[j],
    scores: biased,
    score: biased[j],
    readBack: !stages && attention.has_bias,
    total: weightRow.reduce((sum, value) => sum + value, 0),
    lse: lseValue,
    computed: Math.exp(biased[j] - lseValue),
    weight: weightRow[j],
    weights: weightRow,
    value,
    waits: blob === undefined,
    norm: normRow ? normRow[j] : null,
    carried,
    share: carried ? carried[j] / carried.reduce((sum, value) => sum + value, 0) : null,
    group,
    groupSize: groupOf(attention),
    keyCount: numK,
  };
}
