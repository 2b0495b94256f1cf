// The middle of the page: the chosen view with its few switches, and the map's table twin.

import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { drawnHeads} from "../core/selection.js";
import { percent } from "../core/words.js";
import { html, Picture } from "../paint/dom.js";
import { headsView } from "../views/heads.js";
import { frontOf } from "../views/inspector.js";
import { MAP_LIMIT, mapTable, mapView } from "../views/map.js";
import { excerpt, sentenceView } from "../views/sentence.js";
import { Atlas } from "./atlas.js";
import { act, focusWord, openWindow, pickCell, wordSelector } from "./actions.js";
import { ComparePanel } from "./compare.js";
import { EffectsPanel } from "./effects.js";
import { measure } from "./measure.js";
import { arrived, cell, hover, hovered, recording, selection, theme } from "./store.js";

// Where the pointer was last: words that move under a resting pointer are not hovered.
let rested = "";
export const rest = (event) => (rested = `${event.screenX},${event.screenY}`);

export const hands = {
  act,
  focus(data, event) {
    if (event.currentTarget.matches(":focus-visible")) focusWord(data);
  },
  hover(data, event) {
    if (event.pointerType === "touch" || rested === `${event.screenX},${event.screenY}`) return;
    hovered.value = data;
  },
  pick: pickCell,
};

// The width that an element has, kept up to date.
export function useWidth() {
  const ref = useRef(null);
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const read = () => ref.current && setWidth(Math.floor(ref.current.getBoundingClientRect().width));
    read();
    const watch = new ResizeObserver(read);
    watch.observe(ref.current);
    return () => watch.disconnect();
  }, []);
  return [ref, width];
}

export function Stage({ compact, finding, setFinding }) {
  const [ref, width] = useWidth();
  const s = selection.value;
  const { payload } = recording.value;
  return html`<section class="stage" aria-label="sentence">
    <${Switches} finding=${finding} setFinding=${setFinding} />
    <${Showing} />
    <div class="room" ref=${ref}>
      ${width > 0 && html`<${View} width=${width} compact=${compact} />`}
    </div>
    ${payload.notes?.map((note) => html`<p class="note">${note}</p>`)}
  </section>`;
}

function View({ width, compact }) {
  const s = selection.value;
  const r = recording.value;
  arrived.value;
  if (!r.payload.sides.some((side) => side.tokens.length))
    return html`<div class="state"><h2>No words.</h2><p>This recording holds an empty text. ${r.payload.live ? "Type a sentence above and press Enter." : "Run regard look with a sentence."}</p></div>`;
  const { query_side, key_side } = r.attention(s.attention);
  const large = Math.max(r.units(query_side, s.unit).length, r.units(key_side, s.unit).length) > MAP_LIMIT;
  const beside = s.view === "map" && width >= 1100;
  const textWidth = Math.min(beside ? Math.floor(width / 2) - 24 : width, 960);
  const sentence = sentenceView(r, s, { width: textWidth, measure, hover: hover.value, compact });
  const leave = () => (hovered.value = null);
  const upside = s.view === "map" && !beside && sentence.height > 700;
  return html`<div class=${beside ? "beside" : upside ? "stack upside" : "stack"}>
    <div class="sentence" onPointerLeave=${leave}><${Pages} /><${Picture} list=${sentence} on=${hands} theme=${theme.value} /></div>
    ${s.view === "map" && html`<${large ? Atlas : MapPanel} width=${beside ? Math.floor(width / 2) - 24 : width} key=${`${large}${s.attention}`} />`}
    ${s.view === "heads" && html`<${HeadsPanel} width=${width} />`}
    ${s.view === "compare" && html`<${ComparePanel} width=${width} key=${r.payload.text} />`}
    ${s.view === "effects" && html`<${EffectsPanel} width=${width} />`}
  </div>`;
}

// A long text is turned like pages; a recording of several texts is leafed through.
function Pages() {
  const s = selection.value;
  const r = recording.value;
  const { units } = r;
  const side = r.attention(s.attention).query_side;
  const { length } = units(side, s.unit);
  const [first, end] = excerpt(r, s, side);
  const [at, count] = r.payload.window ?? [0, 1];
  const turn = (by) => act({ type: "page", first: Math.max(0, Math.min(length - (end - first), first + by * (end - first))) });
  const button = (name, off, does) => html`<button type="button" disabled=${off} onClick=${does}>${name}</button>`;
  if (end - first === length && count < 2) return null;
  return html`<div class="pages" role="group" aria-label="pages">
    ${count > 1 && html`<span>${button("text before", at === 0, () => openWindow(at - 1))} text ${at + 1} of ${count} ${button("text after", at + 1 === count, () => openWindow(at + 1))}</span>`}
    ${end - first < length && html`<span>${button("earlier", first === 0, () => turn(-1))} words ${(first + 1).toLocaleString("en")} to ${end.toLocaleString("en")} of ${length.toLocaleString("en")} ${button("later", end === length, () => turn(1))}</span>`}
  </div>`;
}

function MapPanel({ width }) {
  arrived.value;
  const [table, setTable] = useState(false);
  const s = selection.value;
  const list = mapView(recording.value, s, { width: Math.min(width, 720), measure, hover: hover.value, cell: cell.value });
  return html`<div class="map">
    <div class="bar-of-tools"><button type="button" aria-pressed=${String(table)} onClick=${() => setTable(!table)}>as a table</button></div>
    ${table ? html`<${Table} />` : html`<${Picture} list=${list} on=${hands} theme=${theme.value} />`}
  </div>`;
}

function Table() {
  arrived.value;
  const s = selection.value;
  const twin = mapTable(recording.value, s);
  if (!twin) return html`<p class="note">The weights of this layer are not here yet.</p>`;
  return html`<div class="table" tabindex="0" role="region" aria-label="map as a table">
    <table>
      <caption>layer ${s.layer} head ${s.head}: what each row looks at</caption>
      <thead><tr><td></td>${twin.head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
      <tbody>${twin.rows.map((row) => html`<tr><th scope="row">${row.name}</th>${row.cells.map((text) => html`<td>${text}</td>`)}</tr>`)}</tbody>
    </table>
  </div>`;
}

// The pair that heads are sorted by: the word in front and its target.
export function pairOf() {
  const front = frontOf(recording.value, selection.value, null);
  if (!front?.target) return null;
  const attention = recording.value.attention(selection.value.attention);
  const text = (side, at) => recording.value.units(side, selection.value.unit)[at].text;
  const { from, to } = front.target;
  return { from, to, name: `${text(attention.query_side, from)} → ${text(attention.key_side, to)}` };
}

const MEASURES = {
  entropy: "entropy, in nats",
  distance: "distance, in tokens",
  previous: "weight on the token before",
  next: "weight on the token after",
  first: "weight on the first token",
  same: "weight on the token itself",
};

function HeadsPanel({ width }) {
  arrived.value;
  const s = selection.value;
  const pair = pairOf();
  const { num_heads, measures = [] } = recording.value.attention(s.attention);
  const sorts = [...measures, ...Object.keys(recording.value.payload.head_scores ?? {})];
  const small = recording.value.small(s.attention);
  const size = Math.max(24, Math.min(56, Math.floor((width - 40) / num_heads) - 6));
  const list = headsView(recording.value, s, { size, width, pair });
  return html`<div class="bighead">
    <div class="bar-of-tools"><label>sort by <select value=${s.sort} onChange=${(event) => act({ type: "sort", sort: event.currentTarget.value })}>
      <option value="position">position</option>
      ${sorts.map((name) => html`<option value=${name}>${MEASURES[name] ?? name}</option>`)}
      <option value="link" disabled=${!pair || !small}>${!small ? "link (the text is too long)" : pair ? `link ${pair.name}` : "link (choose a word first)"}</option>
    </select></label>
      <span class="note">${recording.value.long(s.attention) && sorts.includes(s.sort) ? "from some rows of this long text" : ""}</span></div>
    <div class="scroll"><${Picture} list=${list} on=${hands} theme=${theme.value} /></div>
  </div>`;
}

function Switches({ finding, setFinding }) {
  const s = selection.value;
  const attention = recording.value.attention(s.attention);
  const choice = (label, pressed, action, key) => html`<button type="button" aria-pressed=${String(pressed)} onClick=${() => act(action)} title=${key && `key ${key}`}>${label}</button>`;
  return html`<div class="switches">
    ${attention.query_side === attention.key_side &&
    html`<div class="pair" role="group" aria-label="question">
      ${choice("looks at", s.mode === "to", { type: "mode", mode: "to" }, "r")}${choice("is looked at by", s.mode === "from", { type: "mode", mode: "from" }, "r")}
    </div>`}
    <div class="pair" role="group" aria-label="units">
      ${choice("words", s.unit === "word", { type: "unit", unit: "word" }, "s")}${choice("subwords", s.unit === "token", { type: "unit", unit: "token" }, "s")}
    </div>
    ${choice(s.heads.length ? `several heads: ${drawnHeads(s).length}` : "several heads", s.heads.length > 0, { type: "several" }, "m")}
    ${finding ? html`<${Find} close=${() => setFinding(false)} />` : html`<button type="button" onClick=${() => setFinding(true)} title="key /">find a word</button>`}
  </div>`;
}

const SHADES = { "": "what the word in front looks at", received: "by what each word receives", given: "by what each word gives to others" };
const OVERS = { "": "this head", "layer-mean": "mean of this layer’s heads", "layer-max": "largest of this layer’s heads", "all-mean": "mean of all layers and heads", "all-max": "largest of all layers and heads" };

// What is shown and what is left out, behind one word; and the legend: what the eye sees, in words.
function Showing() {
  const s = selection.value;
  const r = recording.value;
  if (!["sentence", "map"].includes(s.view)) return null;
  const long = r.long(s.attention);
  const set = (change) => act({ type: "set", change });
  const tick = (name, on, change) => html`<label><input type="checkbox" checked=${on} onChange=${(event) => set(change(event.currentTarget.checked))} /> ${name}</label>`;
  const choose = (name, value, options, change) => html`<label>${name} <select value=${value} onChange=${(event) => set(change(event.currentTarget.value))}>
    ${Object.entries(options).map(([key, text]) => html`<option value=${key} disabled=${long && key !== ""}>${text}</option>`)}</select></label>`;
  const lines = html`<label>at most <input type="number" min="1" max="40" value=${s.top} onChange=${(event) => set({ top: Math.min(40, Math.max(1, Math.round(event.currentTarget.value) || 6)) })} /> lines</label>
    <label>from <input type="number" min="0" max="99" step="0.5" value=${100 * s.least} onChange=${(event) => set({ least: Math.min(0.99, Math.max(0, event.currentTarget.value / 100)) || 0 })} /> %</label>`;
  return html`<details class="showing" open=${Boolean(s.over || s.bare || s.shade || !s.special)}><summary>what is shown</summary>
    <div>${choose("weights of", s.over, OVERS, (over) => ({ over }))}${choose("shade", s.shade, SHADES, (shade) => ({ shade }))}
    ${!long && tick("hide sinks and scale the rest up", s.bare, (bare) => ({ bare }))}${tick("special tokens", s.special, (special) => ({ special }))}${lines}</div></details>
    ${s.view === "sentence" && html`<p class="note legend">${legend(s)}</p>`}`;
}

export function legend(s) {
  const shade = s.shade === "received" ? "Each word is shaded by its share of all attention" : s.shade === "given" ? "Each word is shaded by the share of its attention that goes to other words, sinks and special tokens left out" : "";
  if (s.word === null && !s.pins.length) return shade ? `${shade}.` : "";
  const lines = `A line is as wide and as dark as its weight: at most ${s.top} lines a word, from ${percent(s.least || 0)} on; the rest is one thin bundle`;
  return `${shade ? `${shade}. ` : ""}${lines}.${s.over && !s.heads.length ? ` Weights are the ${OVERS[s.over]}.` : ""}${s.bare ? " Sinks are hidden, and what is left is scaled up to 100 %." : ""}`;
}

function Find({ close }) {
  const [text, setText] = useState("");
  const [at, setAt] = useState(0);
  const s = selection.value;
  const attention = recording.value.attention(s.attention);
  const sides = [...new Set([attention.query_side, attention.key_side])];
  const matches = (needle) => {
    const low = needle.trim().toLowerCase();
    if (!low) return [];
    const all = sides.flatMap((side) => recording.value.units(side, s.unit).map((unit, word) => ({ side, word, text: unit.text.toLowerCase() })));
    const exact = all.filter((u) => u.text === low);
    return [...exact, ...all.filter((u) => u.text !== low && u.text.startsWith(low)), ...all.filter((u) => !u.text.startsWith(low) && u.text.includes(low))];
  };
  const found = matches(text);
  const go = (list, index) => list.length && act({ type: "goWord", ...list[index], keep: true });
  const onKey = (event) => {
    if (event.key === "Escape") {
      event.preventDefault();
      close();
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!found.length) return;
      const next = (at + (event.key === "ArrowDown" ? 1 : found.length - 1)) % found.length;
      setAt(next);
      go(found, next);
    } else if (event.key === "Enter") {
      event.preventDefault();
      if (!found.length) return;
      const { side, word } = found[Math.min(at, found.length - 1)];
      close();
      act({ type: "goWord", side, word });
      requestAnimationFrame(() => document.querySelector(wordSelector(side, word))?.focus());
    }
  };
  const input = (event) => {
    setText(event.currentTarget.value);
    setAt(0);
    go(matches(event.currentTarget.value), 0);
  };
  const state = !text.trim() ? "" : found.length ? `${Math.min(at, found.length - 1) + 1} of ${found.length}` : "no such word";
  return html`<div class="find"><label class="hidden" for="find">find a word</label>
    <input id="find" type="text" autocomplete="off" placeholder="find a word" value=${text} onInput=${input} onKeyDown=${onKey} ref=${(node) => node && !node.dataset.seen && ((node.dataset.seen = "1"), node.focus())} />
    <span class="note" role="status">${state}</span></div>`;
}

