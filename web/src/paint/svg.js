// Display list -> SVG text: one self-contained picture, the same items that the page paints.

import { hex, ramp, THEMES } from "../core/colour.js";
import { indices, pngUri } from "./pixels.js";

const FONT = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif";
const escape = (text) =>
  String(text)
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g, "\ufffd")
    .replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const CELLS = 2500; // up to here a heat item is drawn as crisp squares, above it as one picture

export function toSvg(list, { theme = "light", title = "" } = {}) {
  const colours = THEMES[theme];
  const body = list.items.map((item) => paint(item, colours, theme)).join("");
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${list.width}" height="${list.height}" viewBox="0 0 ${list.width} ${list.height}" font-family="${FONT}" role="img">` +
    `<title>${escape(title)}</title><rect width="100%" height="100%" fill="${colours.paper}"/>${body}</svg>`
  );
}

function data(values) {
  return Object.entries(values ?? {})
    .map(([name, value]) => ` data-${name}="${escape(value)}"`)
    .join("");
}

function paint(item, colours, theme) {
  const colour = (name) => (name ? (colours[name] ?? name) : "none");
  const faded = (name, opacity) => (opacity === undefined || opacity === 1 ? "" : ` ${name}-opacity="${opacity}"`);
  switch (item.t) {
    case "rect":
      return `<rect x="${item.x}" y="${item.y}" width="${item.w}" height="${item.h}"${item.r ? ` rx="${item.r}"` : ""} fill="${colour(item.fill)}"${faded("fill", item.opacity)}/>`;
    case "path":
      return item.fill
        ? `<path d="${item.d}" fill="${colour(item.fill)}"${faded("fill", item.opacity)}${data(item.data)}/>`
        : `<path d="${item.d}" fill="none" stroke="${colour(item.stroke)}" stroke-width="${item.width}"${faded("stroke", item.opacity)}${item.dash ? ` stroke-dasharray="${item.dash}"` : ""}${data(item.data)}/>`;
    case "text": {
      const plate = item.plate ? ` stroke="${colours.paper}" stroke-width="4" stroke-linejoin="round" paint-order="stroke"` : "";
      const turn = item.turn ? ` transform="rotate(-90 ${item.x} ${item.y})"` : "";
      return `<text x="${item.x}" y="${item.y}" font-size="${item.size}"${item.weight > 400 ? ` font-weight="${item.weight}"` : ""} fill="${colour(item.fill)}"${item.anchor === "start" ? "" : ` text-anchor="${item.anchor}"`}${plate}${turn}>${escape(item.text)}</text>`;
    }
    case "heat":
      return item.rows * item.cols <= CELLS ? squares(item, theme) : `<image x="${item.x}" y="${item.y}" width="${item.w}" height="${item.h}" preserveAspectRatio="none" image-rendering="optimizeSpeed" style="image-rendering:pixelated" href="${pngUri(item, theme)}"/>`;
    default: {
      const at = item.x || item.y ? ` transform="translate(${item.x ?? 0} ${item.y ?? 0})"` : "";
      const name = item.name ? ` aria-label="${escape(item.name)}"` : "";
      const role = item.role ? ` role="${item.role}"` : "";
      return `<g${at}${name}${role}${data(item.data)}>${item.items.map((inner) => paint(inner, colours, theme)).join("")}</g>`;
    }
  }
}

function squares(item, theme) {
  const [w, h] = [item.w / item.cols, item.h / item.rows];
  const paths = new Map();
  indices(item).forEach((index, at) => {
    if (!index) return;
    const [x, y] = [item.x + (at % item.cols) * w, item.y + Math.floor(at / item.cols) * h];
    paths.set(index, `${paths.get(index) ?? ""}M${fix(x)} ${fix(y)}h${fix(w)}v${fix(h)}h${fix(-w)}Z`);
  });
  const colours = ramp(theme);
  return [...paths].map(([index, d]) => `<path d="${d}" fill="${hex(colours[index])}"/>`).join("");
}

const fix = (value) => Math.round(value * 100) / 100;
