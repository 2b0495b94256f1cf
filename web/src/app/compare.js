// The Compare view: a second text (or the second model on the same text) beside the one that is shown.

import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { html, Picture } from "../paint/dom.js";
import { compareView } from "../views/compare.js";
import { act } from "./actions.js";
import { measure } from "./measure.js";
import { hands } from "./stage.js";
import { recording, selection, theme } from "./store.js";

const told = signal({ key: "" }); // {key, answer | error}

async function ask(key, body) {
  told.value = { key };
  try {
    const reply = await fetch("api/compare", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const answer = await reply.json();
    if (told.value.key === key) told.value = reply.ok && !answer.error ? { key, answer } : { key, error: answer.error ?? `The server answered ${reply.status}.` };
  } catch {
    if (told.value.key === key) told.value = { key, error: "No answer: the server is not running any more." };
  }
}

export function ComparePanel({ width }) {
  const s = selection.value;
  const { payload } = recording.value;
  const [text, setText] = useState(s.other || payload.text);
  const can = payload.live && payload.asks?.includes("compare");
  const body = JSON.stringify({ other: s.other, attention: s.attention, layer: s.layer, head: s.head });
  const key = `${payload.serial}/${body}`;
  useEffect(() => {
    if (can && s.other && told.value.key !== key) ask(key, body);
  }, [key]);
  if (!can) return html`<div class="effects"><p class="note">Comparing needs the model itself: open the text with regard look TEXT. This page shows a recording.</p></div>`;
  const submit = (event) => {
    event.preventDefault();
    if (text.trim()) act({ type: "set", change: { other: text.trim() } });
  };
  const { answer, error } = told.value;
  const list = answer && compareView(answer, { width, measure, names: [`first, ${payload.model.name}`, `second, ${answer.model}`] });
  return html`<div class="effects">
    <form class="bar-of-tools" onSubmit=${submit}><label for="other">compare with</label><input id="other" class="other" type="text" autocomplete="off" spellcheck="false" value=${text} onInput=${(event) => setText(event.currentTarget.value)} /><button type="submit">compare</button></form>
    <div role="region" aria-label="comparison" aria-live="polite">
      ${error ? html`<p class="trouble">${error}</p>` : list ? html`<${Picture} list=${list} on=${hands} theme=${theme.value} />` : html`<p class="note">${s.other ? "Reading …" : "Change a word of the text and press Enter: the same head is shown for both, word by word."}</p>`}
    </div></div>`;
}
