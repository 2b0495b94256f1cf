"""The report of `regard heads`: one HTML page with its numbers in it.

Enters: what `regard.lens.heads.score_heads` returns.
Leaves: HTML that works offline: heads by any two scores, a list, and a card for each head with its strongest links.
Floor 6: imports no library but the standard one."""

# ruff: noqa: E501 (the page reads better unwrapped)
from __future__ import annotations

import html
import json
from typing import Any

SAID = {
    "previous": "mean weight on the token before",
    "next": "mean weight on the token after",
    "same": "mean weight on the token itself",
    "first": "mean weight on the first token",
    "separator": "mean weight on marks and markers",
    "sink": "largest mean weight that one position receives",
    "distance": "mean distance of what is looked at, tokens",
    "entropy": "entropy of the weights, nats",
    "positional": "share of the departure from uniform weights that distance foretells",
    "content": "1 − positional",
    "induction": "weight on what followed the same token before (random tokens, twice)",
    "duplicate": "weight on the same token before (random tokens, twice)",
    "coreference": "weight of a pronoun on its noun, less that on the other noun",
    "coreference_right": "share of the probes in which its noun gets more than the other",
    "importance": "mean |∂loss / ∂gate|",
    "removal": "loss without the head, less the loss with it",
}


def report_html(told: dict[str, Any]) -> str:
    """The page.

    Args:
        told: what heads.json holds.
    """
    data = json.dumps({**told, "said": SAID}, ensure_ascii=False, separators=(",", ":"))
    for plain, safe in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        data = data.replace(plain, safe)
    title = html.escape(f"{told['name']}: what each head does")
    return PAGE.replace("@TITLE@", title).replace("@DATA@", data)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@TITLE@</title>
<style>
:root { --paper: #fbfaf7; --ink: #1c1b19; --faint: #6b675f; --line: #d8d4ca; --mark: #0072b2; --warm: #b04a00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #ebe8e2; --faint: #a09b91; --line: #3a3d42; --mark: #56b4e9; --warm: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 8px; } p { margin: 4px 0; }
.faint { color: var(--faint); } main { display: flex; flex-wrap: wrap; gap: 24px; }
#plot { flex: 2 1 520px; } #card { flex: 1 1 320px; border-left: 1px solid var(--line); padding-left: 24px; }
svg { width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
circle { fill: var(--mark); fill-opacity: .55; cursor: pointer; } circle.on { fill: var(--warm); fill-opacity: 1; }
circle:focus-visible { outline: 2px solid var(--ink); }
select, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); padding: 4px 8px; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: 2px 12px 2px 0; }
td.n, th.n { text-align: right; } tr { border-bottom: 1px solid var(--line); }
.link { margin: 8px 0; } .q { color: var(--warm); font-weight: 600; } .k { color: var(--mark); font-weight: 600; }
</style></head><body>
<h1>@TITLE@</h1><p class="faint" id="about"></p><p id="notes" class="faint"></p>
<h2>Heads by two scores</h2>
<p><label>across <select id="x"></select></label> <label>up <select id="y"></select></label></p>
<main><div id="plot"></div><section id="card" aria-live="polite"></section></main>
<h2>Highest <select id="by" aria-label="score"></select></h2><table id="top"></table>
<div id="groups"></div>
<h2>What the scores mean</h2><table id="said"></table>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const told = JSON.parse(document.getElementById("data").textContent), heads = told.heads, names = told.scores;
const $ = (id) => document.getElementById(id), show = (v) => v === undefined ? "–" : v.toPrecision(3);
const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls; return e; };
const label = (h) => (told.heads.some((o) => o.kind !== h.kind) ? h.kind + " " : "") + `layer ${h.layer} head ${h.head}`;
$("about").textContent = `${heads.length} heads · ${told.windows} windows of at most ${told.window} tokens of `
  + `${told.corpus}, ${told.tokens.toLocaleString("en")} tokens · ${told.probes} pronoun probes`;
$("notes").textContent = [...told.notes, ...(told.skipped.length
  ? [`${told.skipped.length} broken lines were skipped: ${told.skipped.slice(0, 5).join("; ")}`] : [])].join(" ");
for (const [id, first] of [["x", "previous"], ["y", names.includes("induction") ? "induction" : "importance"],
  ["by", names.includes("importance") ? "importance" : names[0]]]) {
  for (const name of names) $(id).append(make("option", name)); $(id).value = first; $(id).onchange = draw; }
let chosen = heads[0];
const svg = (tag, attributes, text) => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); if (text) e.textContent = text; return e; };
function axis(name) { const all = heads.map((h) => h[name]).filter((v) => v !== undefined);
  const low = Math.min(0, ...all), high = Math.max(...all, low + 1e-9);
  return { low, high, at: (v) => (v - low) / (high - low) }; }
function draw() {
  const W = 640, H = 440, L = 56, B = 40, x = axis($("x").value), y = axis($("y").value);
  const s = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": "heads by two scores" });
  const X = (v) => L + x.at(v) * (W - L - 16), Y = (v) => H - B - y.at(v) * (H - B - 16);
  s.append(svg("path", { d: `M${L} 16V${H - B}H${W - 16}`, fill: "none", stroke: "var(--line)" }));
  for (let i = 0; i <= 4; i++) {
    const a = x.low + (x.high - x.low) * i / 4, b = y.low + (y.high - y.low) * i / 4;
    s.append(svg("text", { x: X(a), y: H - B + 16, "text-anchor": "middle" }, show(a)));
    s.append(svg("text", { x: L - 6, y: Y(b) + 4, "text-anchor": "end" }, show(b))); }
  s.append(svg("text", { x: W - 16, y: H - 6, "text-anchor": "end" }, $("x").value));
  s.append(svg("text", { x: 8, y: 12 }, $("y").value));
  for (const h of heads) { if (h[$("x").value] === undefined || h[$("y").value] === undefined) continue;
    const c = svg("circle", { cx: X(h[$("x").value]), cy: Y(h[$("y").value]), r: h === chosen ? 7 : 5, tabindex: 0,
      role: "button", "aria-label": `${label(h)}: ${show(h[$("x").value])}, ${show(h[$("y").value])}` });
    if (h === chosen) c.classList.add("on"); c.append(svg("title", {}, label(h)));
    const pick = () => { chosen = h; draw(); }; c.onclick = pick; c.onkeydown = (e) => { if (e.key === "Enter") pick(); };
    s.append(c); }
  $("plot").replaceChildren(s); card(); top10(); }
function card() {
  const rows = make("table"); for (const name of names) { const r = make("tr"); r.append(make("td", name),
    make("td", show(chosen[name]), "n")); r.title = told.said[name]; rows.append(r); }
  const found = chosen.examples.map((one) => { const p = make("p", undefined, "link");
    one.tokens.forEach((t, i) => p.append(i === one.query ? make("span", t, "q") : i === one.key ? make("span", t, "k")
      : t)); p.append(make("span", `  ${show(one.weight)}, line ${one.line}`, "faint")); return p; });
  const said = make("p", "The warm word looks at the blue one:", "faint");
  $("card").replaceChildren(make("h2", label(chosen)), rows, ...(found.length ? [said, ...found]
    : [make("p", "It has no strong link between words that are no neighbours.", "faint")])); }
function top10() { const by = $("by").value, t = $("top"), head = make("tr");
  head.append(make("th", "head"), ...names.map((n) => make("th", n, "n"))); t.replaceChildren(head);
  for (const h of [...heads].sort((a, b) => (b[by] ?? -1e9) - (a[by] ?? -1e9)).slice(0, 12)) { const r = make("tr");
    const b = make("button", label(h)); b.onclick = () => { chosen = h; draw(); }; const d = make("td"); d.append(b);
    r.append(d, ...names.map((n) => make("td", show(h[n]), "n"))); t.append(r); } }
if (told.groups.length) { const t = make("table"), head = make("tr");
  head.append(...["removed", "heads", "loss with all", "loss without", "random sets as large: lowest, median, highest"]
    .map((w) => make("th", w))); t.append(head);
  for (const g of told.groups) { const r = make("tr"), q = g.random; r.append(make("td", g.name),
    make("td", g.heads.join(", ")), make("td", show(g.loss), "n"), make("td", show(g.without), "n"),
    make("td", q ? `${show(q.lowest)}, ${show(q.median)}, ${show(q.highest)} (${q.sets} sets)` : "–")); t.append(r); }
  $("groups").append(make("h2", "What removing them does, on random tokens said twice (loss of the second turn, nats)"),
    t); }
for (const name of names) { const r = make("tr"); r.append(make("td", name), make("td", told.said[name]));
  $("said").append(r); }
draw();
</script></body></html>
"""
