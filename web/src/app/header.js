// The head of the page: what is open, the text field, theme, save and help.

import { useEffect, useRef, useState } from "preact/hooks";
import { html } from "../paint/dom.js";
import { runAgain } from "./actions.js";
import { save } from "./save.js";
import { recording, run, selection, theme } from "./store.js";

export function Header({ onHelp }) {
  const { model, live, runs = live, text } = recording.value.payload;
  const heads = `${model.num_layers} × ${model.num_heads} heads`;
  return html`<header class="head">
    <h1>regard</h1>
    <p class="facts"><b>${model.name}</b> · ${heads} · exact</p>
    <${TextField} live=${runs} text=${text} key=${text} />
    <div class="tools">
      <button type="button" onClick=${turnTheme} aria-label=${`theme: ${theme.value}`}><span aria-hidden="true">◐</span> <span class="wide">${theme.value}</span></button>
      <${SaveMenu} />
      <button type="button" onClick=${onHelp} aria-label="keys"><span aria-hidden="true">?</span> <span class="wide">keys</span></button>
    </div>
    <${RunState} />
  </header>`;
}

function TextField({ live, text }) {
  const [value, setValue] = useState(text);
  const running = run.value.kind === "running";
  const submit = (event) => {
    event.preventDefault();
    if (live && !running) runAgain(value);
  };
  return html`<form class="ask" onSubmit=${submit}>
    <label class="hidden" for="text">text</label>
    <input id="text" type="text" autocomplete="off" spellcheck="false" value=${value} readonly=${!live || running} aria-describedby="text-note"
      onInput=${(event) => setValue(event.currentTarget.value)} />
    ${live
      ? html`<button type="submit" disabled=${running} aria-label="run the model on this text"><span aria-hidden="true">⏎</span> <span class="wide">run</span></button><span id="text-note" class="hidden">Enter runs the model on this text.</span>`
      : html`<span id="text-note" class="note" title="To ask your own sentence, run: regard look">a recording</span>`}
  </form>`;
}

function RunState() {
  const state = run.value;
  if (state.kind === "running")
    return html`<div class="running" role="status"><span class="bar" aria-hidden="true"></span>Reading the sentence with ${recording.value.payload.model.name} …</div>`;
  if (state.kind === "failed")
    return html`<div class="trouble" role="alert"><b>${state.title}</b> ${state.text} <button type="button" onClick=${() => (run.value = { kind: "idle" })}>dismiss</button></div>`;
  return null;
}

function SaveMenu() {
  const [open, setOpen] = useState(false);
  const ref = useRef(null);
  useEffect(() => {
    if (!open) return undefined;
    const away = (event) => {
      if (event.type === "keydown" && event.key === "Escape") {
        event.preventDefault();
        ref.current.querySelector("button").focus();
        setOpen(false);
      } else if (event.type === "pointerdown" && !ref.current.contains(event.target)) setOpen(false);
    };
    addEventListener("pointerdown", away);
    addEventListener("keydown", away, true);
    return () => {
      removeEventListener("pointerdown", away);
      removeEventListener("keydown", away, true);
    };
  }, [open]);
  const item = (format, what) => html`<button type="button" onClick=${() => (setOpen(false), save(format))}><b>${format.toUpperCase()}</b> ${what}</button>`;
  return html`<div class="menu" ref=${ref}>
    <button type="button" aria-expanded=${String(open)} aria-label="save this view" onClick=${() => setOpen(!open)}><span aria-hidden="true">⇩</span> <span class="wide">save</span></button>
    ${open && html`<div class="choices">${item("html", "this page, offline")}${item("svg", "the picture")}${item("png", "the picture, as pixels")}${item("json", "the numbers")}${item("session", "to open again with regard look")}</div>`}
  </div>`;
}

function turnTheme() {
  theme.value = theme.value === "light" ? "dark" : "light";
  try {
    localStorage.setItem("regard-theme", theme.value);
  } catch {
    /* a page that may not store forgets */
  }
}

// Views, and which attention of the model is looked at.
export function Tabs({ act }) {
  const s = selection.value;
  const { attentions } = recording.value.payload;
  const tab = (view, name) => html`<button type="button" aria-pressed=${String(s.view === view)} onClick=${() => act({ type: "view", view })}>${name}</button>`;
  return html`<nav class="tabs" aria-label="views">
    <div role="group" aria-label="view">${tab("sentence", "Sentence")}${tab("heads", "Heads")}${tab("map", "Map")}${tab("effects", "Effects")}${tab("compare", "Compare")}</div>
    ${attentions.length > 1 &&
    html`<div role="group" aria-label="attention" class="kinds">
      ${attentions.map((a, i) => html`<button type="button" aria-pressed=${String(s.attention === i)} onClick=${() => act({ type: "attention", index: i })}>${a.label}</button>`)}
    </div>`}
  </nav>`;
}
