// Display list -> page: shapes as SVG, text as text, buttons as buttons. The same items that paint/svg.js writes.

import { h } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";
import htm from "htm";
import { ramp } from "../core/colour.js";
import { indices } from "./pixels.js";

export const html = htm.bind(h);
const px = (value) => `${value}px`;
const paintColour = (name) => (name ? `var(--${name})` : "none");

// Half of what the font stands above its baseline more than below it: where HTML puts the text that SVG puts at y.
let rise = 0.35;
export const setRise = (value) => (rise = value);

// on: {act(action, event), hover(button or null), pick(cell or null, chosen)}
export function Picture({ list, on, theme, name, role }) {
  return html`<div class="picture" style=${{ width: px(list.width), height: px(list.height) }} role=${role} aria-label=${name}>
    ${paintItems(list.items, on, theme, list)}
  </div>`;
}

function paintItems(items, on, theme, size) {
  const out = [];
  let run = [];
  const flush = () => {
    if (run.length) out.push(html`<svg key=${`s${out.length}`} class="lines" aria-hidden="true" width=${size?.width ?? 1} height=${size?.height ?? 1}>${run}</svg>`);
    run = [];
  };
  items.forEach((item, i) => {
    if (item.t === "path") return run.push(pathNode(item, i));
    flush();
    out.push(node(item, item.key ?? `${item.t}${i}`, on, theme));
  });
  flush();
  return out;
}

function pathNode(item, i) {
  const data = Object.fromEntries(Object.entries(item.data ?? {}).map(([name, value]) => [`data-${name}`, value]));
  return item.fill
    ? html`<path key=${item.key ?? i} d=${item.d} style=${{ fill: paintColour(item.fill), opacity: item.opacity }} ...${data} />`
    : html`<path key=${item.key ?? i} d=${item.d} fill="none" stroke-width=${item.width} stroke-dasharray=${item.dash || undefined}
        style=${{ stroke: paintColour(item.stroke), strokeOpacity: item.opacity }} ...${data} />`;
}

function node(item, key, on, theme) {
  switch (item.t) {
    case "text":
      return html`<${Words} key=${key} item=${item} />`;
    case "rect":
      return html`<i key=${key} style=${{ left: px(item.x), top: px(item.y), width: px(item.w), height: px(item.h), borderRadius: px(item.r ?? 0), background: paintColour(item.fill), opacity: item.opacity ?? 1 }}></i>`;
    case "heat":
      return html`<${Heat} key=${key} item=${item} on=${on} theme=${theme} />`;
    case "button":
      return button(item, key, on, theme);
    default:
      return html`<div key=${key} class="group" role=${item.role} aria-label=${item.name} style=${{ left: px(item.x ?? 0), top: px(item.y ?? 0) }}>
        ${paintItems(item.items, on, theme)}
      </div>`;
  }
}

function Words({ item }) {
  const top = item.y - item.size * (0.5 + rise);
  const style = { left: px(item.x), top: px(top), fontSize: px(item.size), color: paintColour(item.fill), fontWeight: item.weight ?? 400 };
  if (item.turn) Object.assign(style, { transform: "rotate(-90deg)", transformOrigin: `0 ${item.size * (0.5 + rise)}px` });
  const classes = `t ${item.anchor}${item.plate ? " plate" : ""}${item.tabular ? " tabular" : ""}`;
  if (item.heading) return html`<span class=${classes} style=${style} role="heading" aria-level=${item.heading}>${item.text}</span>`;
  return html`<span class=${classes} style=${style} aria-hidden=${item.plate || item.turn || item.quiet ? "true" : undefined}>${item.text}</span>`;
}

function button(item, key, on, theme) {
  const data = Object.fromEntries(Object.entries(item.data ?? {}).map(([name, value]) => [`data-${name}`, value]));
  return html`<button key=${key} type="button" class=${`b ${item.kind}`} aria-label=${item.name}
    aria-pressed=${item.pressed === undefined ? undefined : String(item.pressed)}
    aria-expanded=${item.expanded === undefined ? undefined : String(item.expanded)}
    tabindex=${item.tab ? 0 : -1}
    style=${{ left: px(item.x), top: px(item.y), width: px(item.w), height: px(item.h) }}
    onClick=${(event) => on.act(item.action, event)}
    onFocus=${item.kind === "word" ? (event) => on.focus?.(item.data, event) : undefined}
    onPointerEnter=${item.kind === "word" ? (event) => on.hover?.(item.data, event) : undefined}
    ...${data}>${paintItems(item.items, on, theme, { width: item.w, height: item.h }).flatMap((child) => [child, " "])}</button>`;
}

function Heat({ item, on, theme }) {
  const ref = useRef(null);
  useLayoutEffect(() => {
    const canvas = ref.current;
    const context = canvas.getContext("2d");
    const image = context.createImageData(item.cols, item.rows);
    const colours = ramp(theme);
    indices(item).forEach((index, at) => {
      const [r, g, b] = colours[index];
      image.data.set([r, g, b, index ? 255 : 0], 4 * at);
    });
    context.putImageData(image, 0, 0);
  }, [item.values, item.cols, item.rows, item.max, theme]);
  const cellOf = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const col = Math.floor(((event.clientX - box.left) / box.width) * item.cols);
    const row = Math.floor(((event.clientY - box.top) / box.height) * item.rows);
    return row >= 0 && row < item.rows && col >= 0 && col < item.cols ? { row, col } : null;
  };
  const hands = item.pick
    ? { onPointerMove: (e) => on.pick(cellOf(e), false), onPointerLeave: () => on.pick(null, false), onClick: (e) => on.pick(cellOf(e), true) }
    : {};
  return html`<canvas ref=${ref} width=${item.cols} height=${item.rows} class=${item.pick ? "heat pick" : "heat"}
    role=${item.name ? "img" : undefined} aria-label=${item.name} aria-hidden=${item.name ? undefined : "true"}
    style=${{ left: px(item.x), top: px(item.y), width: px(item.w), height: px(item.h) }} ...${hands}></canvas>`;
}
