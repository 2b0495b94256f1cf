// The Effects view: choose what to cut, ask the server, keep what it said.

import { signal } from "@preact/signals";
import { useState } from "preact/hooks";
import { html, Picture } from "../paint/dom.js";
import { cutsAt, effectsView } from "../views/effects.js";
import { frontOf } from "../views/inspector.js";
import { measure } from "./measure.js";
import { hands } from "./stage.js";
import { arrived, recording, selection, theme } from "./store.js";
import { TrustPanel } from "./trust.js";

const made = signal([]);
const KEPT = 8;
let of = null; // the recording that they were made on

async function cut(what, ablation, renormalise) {
  const { payload } = recording.value;
  const how = `${ablation === "zero" ? "left out" : "replaced by its mean"}${renormalise ? ", the other weights scaled up" : ""}`;
  const one = { name: what.name, how };
  made.value = [one, ...made.value].slice(0, KEPT);
  const put = (change) => (made.value = made.value.map((other) => (other === one ? { ...one, ...change } : other)));
  try {
    const body = JSON.stringify({ text: payload.text, ablation, renormalise, controls: 20, seed: 0, cuts: [what.cuts] });
    const reply = await fetch("api/effects", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const answer = await reply.json();
    put(reply.ok && !answer.error ? { answer } : { error: answer.error ?? `The server answered ${reply.status}.` });
  } catch {
    put({ error: "No answer: the server is not running any more." });
  }
}

export function EffectsPanel({ width }) {
  arrived.value;
  const [ablation, setAblation] = useState("zero");
  const [renormalise, setRenormalise] = useState(false);
  const r = recording.value;
  if (of !== r) {
    of = r;
    if (made.value.length) made.value = [];
  }
  if (!r.payload.live || !r.payload.asks?.includes("effects"))
    return html`<div class="effects"><p class="note">${r.payload.runs ? "This server measures no effects." : "Cutting needs the model itself: open the text with regard look TEXT. This page shows a recording."}</p></div>`;
  const front = frontOf(r, selection.value, null);
  const can = cutsAt(r, selection.value, front?.links ? front : null);
  const button = (label, what) => html`<button type="button" disabled=${!what} onClick=${() => cut(what, ablation, renormalise)}>${label}${what ? "" : " (choose a word first)"}</button>`;
  const list = effectsView(made.value, { width: Math.min(width, 640), measure });
  return html`<div class="effects">
    <div class="bar-of-tools">${button("cut this line", can.line)}${button("cut this head", can.head)}${button("cut this word", can.word)}
      <label>a cut <select value=${ablation} onChange=${(event) => setAblation(event.currentTarget.value)}><option value="zero">leaves it out</option><option value="mean">puts its mean there</option></select></label>
      <label><input type="checkbox" checked=${renormalise} onChange=${(event) => setRenormalise(event.currentTarget.checked)} /> scale the other weights up</label></div>
    ${can.line && html`<p class="note">This line is ${can.line.name}.</p>`}
    <div role="region" aria-label="effects" aria-live="polite"><${Picture} list=${list} on=${hands} theme=${theme.value} /></div>
    <${TrustPanel} width=${Math.min(width, 640)} />
  </div>`;
}
