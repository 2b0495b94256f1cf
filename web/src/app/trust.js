// The trust panel of the Effects view: six attributions of one answer, each put to the test on this input.

import { signal } from "@preact/signals";
import { html, Picture } from "../paint/dom.js";
import { percent } from "../core/words.js";
import { shownText } from "../core/text.js";
import { trustSaid, trustView } from "../views/trust.js";
import { act, readTwin } from "./actions.js";
import { measure } from "./measure.js";
import { recording, run, selection, theme } from "./store.js";

const NONE = { kind: "idle" };
const told = signal(NONE); // idle | waiting | failed {text} | ready {answer}
const picked = signal("");
let of = null; // the recording that was asked about

async function ask(position, target) {
  const r = recording.value;
  const { answer } = told.value;
  told.value = { kind: "waiting", position, answer };
  const put = (next) => of === r && (told.value = { position, ...next });
  try {
    const body = JSON.stringify({ text: r.payload.text, ...(position !== null && { position }), ...(target !== null && { target }) });
    const reply = await fetch("api/trust", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    const found = await reply.json();
    put(reply.ok && !found.error ? { kind: "ready", answer: found } : { kind: "failed", text: found.error ?? `The server answered ${reply.status}.` });
  } catch {
    put({ kind: "failed", text: "No answer: the server is not running any more." });
  }
}

export function TrustPanel({ width }) {
  const r = recording.value;
  const s = selection.value;
  if (of !== r) {
    of = r;
    if (told.value.kind !== "idle") told.value = NONE;
  }
  const { payload } = r;
  if (!payload.live || !payload.asks?.includes("trust")) return null;
  const { kind, answer, text, position = null } = told.value;
  const { query_side, causal } = r.attention(s.attention);
  const front = causal && s.word !== null && s.side === query_side ? r.units(query_side, s.unit)[s.word] : null;
  const place = front ? front.tokens[1] - 1 : null;
  const waiting = kind === "waiting";
  const start = (at) => () => ask(at, null);
  const on = { act: (action) => (picked.value = picked.value === action.name ? "" : action.name) };
  const tokens = payload.sides[query_side].tokens.map((token) => token.text);
  const options = answer?.likeliest ?? [];
  return html`<section class="trust" aria-label="trust">
    <h2>Which weight can be trusted here?</h2>
    <div class="bar-of-tools"><button type="button" disabled=${waiting} onClick=${start(null)}>put six attributions to the test</button>
      ${front && html`<button type="button" disabled=${waiting} onClick=${start(place)}>for what follows “${shownText(front.text.trim())}”</button>`}
      ${options.length > 0 && html`<label>answer <select disabled=${waiting} value=${String(answer.target)} onChange=${(event) => ask(position, Number(event.currentTarget.value))}>
        ${options.map(({ id, text, before }) => html`<option value=${String(id)}>${shownText(text.trim())} ${percent(before)}</option>`)}</select></label>`}</div>
    <p role="status" class=${kind === "failed" ? "trouble" : "note"}>${kind === "failed" ? text : waiting ? "Taking tokens away and putting them back: some hundred runs of the model …" : answer ? trustSaid(answer) : "Raw weight, weight × value norm, rollout, flow, gradient × attention and true deletion, each beside random orders."}</p>
    ${waiting && html`<span class="bar" aria-hidden="true"></span>`}
    ${kind === "ready" && html`<${Picture} list=${trustView(answer, { width, measure, picked: picked.value, tokens })} on=${on} theme=${theme.value} />`}
    <${Twins} twins=${payload.twins} text=${payload.text} />
  </section>`;
}

// Two sentences that differ at the end alone: does the line turn with the meaning?
function Twins({ twins, text }) {
  if (!twins?.length) return null;
  const [first, second] = twins.find((pair) => pair.includes(text)) ?? twins[0];
  const open = text === first || text === second;
  const other = text === first ? second : first;
  const busy = run.value.kind === "running";
  const read = (sentence, beside) => () => readTwin(sentence, beside);
  return html`<p class="note twins">${open
    ? html`Its twin ends otherwise: “${other}” <button type="button" class="link" disabled=${busy} onClick=${read(other, text)}>read the twin</button>
      <button type="button" class="link" onClick=${() => act({ type: "set", change: { view: "compare", other } })}>compare the two</button>`
    : html`<button type="button" class="link" disabled=${busy} onClick=${read(first, second)}>try a pair of sentences that differ at the end</button>`}
    ${" "}In MiniLM the head that links “it” to a noun turns with the meaning in 1 pair of 8: a head links words; what a sentence means it does not say.</p>`;
}
