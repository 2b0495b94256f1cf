// The page: opens the recording, draws every view from the one selection, listens to the keyboard and the address.

import "../draw.js";
import { render } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { signal } from "@preact/signals";
import { THEMES } from "../core/colour.js";
import { headsOf, labelOf } from "../core/links.js";
import { percent } from "../core/words.js";
import { html, Picture } from "../paint/dom.js";
import { headsView } from "../views/heads.js";
import { inspectorView, spoken } from "../views/inspector.js";
import { act, headSelector, takeFocus, wordSelector } from "./actions.js";
import { Header, Tabs } from "./header.js";
import { KEYS, onKey } from "./keys.js";
import { measure, readRise } from "./measure.js";
import { copy, keepSource } from "./save.js";
import { hands, pairOf, rest, Stage, useWidth } from "./stage.js";
import { arrived, followAddress, hover, notice, open, recording, selection, status, theme } from "./store.js";

const compact = signal(false);

function App() {
  const [finding, setFinding] = useState(false);
  const help = useRef(null);
  const showHelp = () => help.current.showModal();
  useEffect(() => {
    const keys = (event) => onKey(event, { find: () => setFinding(true), help: showHelp });
    addEventListener("keydown", keys);
    addEventListener("pointermove", rest);
    return () => {
      removeEventListener("keydown", keys);
      removeEventListener("pointermove", rest);
    };
  }, []);
  selection.value;
  useLayoutEffect(() => {
    const selector = takeFocus();
    if (selector) document.querySelector(selector)?.focus();
  });
  const { side, word, unit, view } = selection.value;
  useEffect(() => {
    if (word === null || view !== "sentence") return undefined;
    const wait = requestAnimationFrame(() => {
      const node = document.querySelector(wordSelector(side, word));
      const box = node?.getBoundingClientRect();
      if (box && (box.bottom < 0 || box.top > innerHeight - 40)) node.scrollIntoView({ block: "center" });
    });
    return () => cancelAnimationFrame(wait);
  }, [side, word, unit, view]);
  return html`<${Header} onHelp=${showHelp} />
    <${Tabs} act=${act} />
    <main class=${`view-${selection.value.view}`}>
      <${Stage} compact=${compact.value} finding=${finding} setFinding=${setFinding} />
      ${selection.value.view !== "heads" && html`<${HeadsColumn} />`}
      <${Inspector} />
    </main>
    <${Said} />
    <dialog ref=${help} aria-labelledby="keys-title">
      <h2 id="keys-title">keys</h2>
      <dl>${KEYS.map(([key, does]) => html`<dt>${key.split(" ").map((k) => html`<kbd>${k}</kbd> `)}</dt><dd>${does}</dd>`)}</dl>
      <button type="button" onClick=${() => help.current.close()}>close</button>
    </dialog>`;
}

function HeadsColumn() {
  const s = selection.value;
  const r = recording.value;
  arrived.value;
  const list = headsView(r, { ...s, sort: "position" });
  const pair = pairOf();
  const best = pair ? headsOf(r, s, pair.from, pair.to).slice(0, 5) : [];
  const grid = useRef(null);
  const label = labelOf(r, s.attention, s.layer, s.head);
  useEffect(() => {
    const box = grid.current.getBoundingClientRect();
    const own = grid.current.querySelector(headSelector(s.layer, s.head))?.getBoundingClientRect();
    if (!own) return;
    if (own.top < box.top || own.bottom > box.bottom) grid.current.scrollTop += own.top - box.top - box.height / 2;
    if (own.left < box.left || own.right > box.right) grid.current.scrollLeft += own.left - box.left - box.width / 2;
  }, [s.attention, s.layer, s.head]);
  return html`<aside class="heads" aria-label="heads">
    <h2>heads</h2>
    <div class="scroll" ref=${grid}><${Picture} list=${list} on=${hands} theme=${theme.value} /></div>
    ${label && html`<p class="note label">layer ${s.layer} head ${s.head}: ${label} over a corpus</p>`}
    ${best.length > 1 &&
    html`<div class="best"><h3>${pair.name}, strongest in</h3>
      <ol>${best.map(({ layer, head, weight }) => html`<li><button type="button" class="link" aria-pressed=${String(layer === s.layer && head === s.head)}
        onClick=${() => act({ type: "head", layer, head })}><span>layer ${layer} head ${head}</span><span class="tabular">${percent(weight)}</span></button></li>`)}</ol></div>`}
  </aside>`;
}

function Inspector() {
  const [ref, width] = useWidth();
  const [folded, setFolded] = useState(false);
  arrived.value;
  const list = width > 0 ? inspectorView(recording.value, selection.value, { width, measure, hover: hover.value }) : null;
  return html`<section class=${folded ? "inspector folded" : "inspector"} role="region" aria-label="inspector">
    ${compact.value && html`<button type="button" class="handle" aria-expanded=${String(!folded)} onClick=${() => setFolded(!folded)}>${folded ? "show the numbers" : "hide the numbers"}</button>`}
    <div class="sheet" tabindex="0" role="group" aria-label="numbers"><div ref=${ref}>${list && !folded && html`<${Picture} list=${list} on=${hands} theme=${theme.value} />`}</div></div>
    ${!folded && selection.value.word !== null && html`<div class="bar-of-tools"><button type="button" onClick=${copy}>copy the numbers</button><span class="note">${notice.value}</span></div>`}
  </section>`;
}

// What a listener hears when the selection moves.
function Said() {
  arrived.value;
  return html`<p class="hidden" role="status" aria-live="polite" id="said">${spoken(recording.value, selection.value)}</p>
    <p class="hidden" role="status" aria-live="polite">${notice.value}</p>`;
}

function Page() {
  const state = status.value;
  if (state.kind === "ready") return html`<${App} />`;
  return html`<main class="state"><h1>regard</h1><div role=${state.kind === "failed" ? "alert" : "status"}>
    ${state.kind === "loading" ? html`<p>Opening the recording …</p><span class="bar" aria-hidden="true"></span>` : html`<h2>${state.title}</h2><p>${state.text}</p><p>${state.fix}</p>`}
  </div></main>`;
}

function wearTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem("regard-theme");
  } catch {
    /* not allowed to remember */
  }
  theme.value = chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
  system.addEventListener("change", (event) => {
    if (!chosen) theme.value = event.matches ? "dark" : "light";
  });
  theme.subscribe((name) => {
    const root = document.documentElement;
    root.dataset.theme = name;
    for (const [key, colour] of Object.entries(THEMES[name])) root.style.setProperty(`--${key}`, colour);
  });
}

async function start() {
  keepSource();
  wearTheme();
  readRise();
  const narrow = matchMedia("(max-width: 719px)");
  compact.value = narrow.matches;
  narrow.addEventListener("change", (event) => (compact.value = event.matches));
  render(html`<${Page} />`, document.getElementById("page"));
  try {
    let payload = JSON.parse(document.getElementById("regard-payload").textContent);
    if (!payload) {
      const reply = await fetch("api/payload");
      payload = await reply.json();
      if (!reply.ok || payload.error) throw new Error(payload.error ?? `the server answered ${reply.status}`);
    }
    if (payload.format !== "regard-page/1") throw new Error(`its format is ${payload.format}; this page reads regard-page/1`);
    open(payload);
  } catch (error) {
    const live = location.protocol.startsWith("http");
    status.value = {
      kind: "failed",
      title: "The recording could not be opened.",
      text: `${error.message}`,
      fix: live ? "If the server has stopped, start it again with regard look and reload this page." : "The file may be cut short. Write it again with regard look … --save.",
    };
  }
  addEventListener("popstate", followAddress);
  addEventListener("hashchange", followAddress);
}

if (typeof document !== "undefined") start(); // in QuickJS the script only offers regardDraw
