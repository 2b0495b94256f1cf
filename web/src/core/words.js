// Numbers and links as people read them.

export function percent(weight) {
  const value = weight * 100;
  if (value === 0) return "0 %";
  if (value < 0.95) return value < 0.095 ? "< 0.1 %" : `${value.toFixed(1)} %`;
  return `${Math.round(value)} %`;
}

// Four significant digits, a true minus sign, no exponent for everyday sizes.
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === Infinity) return "∞";
  if (value === -Infinity) return "−∞";
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e5 || size < 1e-4) text = value.toExponential(2);
  else text = value.toFixed(Math.min(6, Math.max(0, 3 - Math.floor(Math.log10(size)))));
  return text.replace("-", "−");
}

// A weight with the digits that a picture drops.
export function exact(weight) {
  return weight === 0 ? "0" : weight >= 1e-4 ? weight.toFixed(4) : weight.toExponential(2).replace("-", "−");
}

const SEPARATOR = /sep|eos|<\/s>|endoftext|im_end|end_of/i;
const START = /cls|bos|<s>|begin|start|im_start/i;

// What a special token or a sink is called beside its number; "" for an ordinary word.
// mean: the mean weight that it gets from all rows.
export function roleOf(unit, index, mean) {
  if (mean > 0.3 && (unit.special || index === 0)) return "sink";
  if (!unit.special) return "";
  if (SEPARATOR.test(unit.text)) return "separator";
  if (START.test(unit.text)) return "start";
  return "special";
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

export const quote = (text) => `“${text}”`;
