"""The report of `regard prune`: loss against heads kept, drawn.

Enters: what `prune_model` measured.
Leaves: one HTML page with an SVG, without scripts.
Floor 6: imports no library but the standard one."""

# ruff: noqa: E501 (the page reads better unwrapped)
from __future__ import annotations

import html
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM = 680, 400, 64, 48


def prune_html(told: dict[str, Any]) -> str:
    """The page.

    Args:
        told: what prune.json holds.
    """
    rows = [
        ("heads of each layer", *told["heads_per_layer"]),
        ("key/value heads of each layer", *told["kv_heads_per_layer"]),
        ("parameters", *(f"{own:,}" for own in told["parameters"])),
        ("loss on held-out text, nats", f"{told['loss']['whole']:.3f}", f"{told['loss']['pruned']:.3f}"),
        ("the same, random groups removed", f"{told['loss']['whole']:.3f}", f"{told['loss']['random']:.3f}"),
        (
            f"forward pass of {told['speed']['tokens']} tokens, ms (median of {told['speed']['runs']})",
            f"{told['speed']['whole_ms']:.1f}",
            f"{told['speed']['pruned_ms']:.1f}",
        ),
    ]
    body = "".join(f"<tr><td>{a}</td><td class=n>{b}</td><td class=n>{c}</td></tr>" for a, b, c in rows)
    return PAGE.format(
        title=html.escape(f"{told['name']}: fewer heads"),
        summary=html.escape(told["summary"]),
        rows=body,
        plot=_plot(told),
    )


def _plot(told: dict[str, Any]) -> str:
    curve = told["curve"]
    shares = [1.0, *curve["shares"]]
    lines = [[curve["whole"], *own] for own in (curve["importance"], *curve["random"])]
    low, high = min(min(line) for line in lines), max(max(line) for line in lines)

    def at(share: float, loss: float) -> str:
        x = LEFT + share * (WIDTH - LEFT - 16)
        y = HEIGHT - BOTTOM - (loss - low) / max(high - low, 1e-9) * (HEIGHT - BOTTOM - 16)
        return f"{x:.1f} {y:.1f}"

    marks = []
    for step in range(5):
        loss = low + (high - low) * step / 4
        y = at(0, loss).split()[1]
        marks.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end" dy="4">{loss:.1f}</text>')
        x = at(step / 4, low).split()[0]
        marks.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{25 * step} %</text>')
    drawn = [
        f'<polyline class="{"own" if number == 0 else "random"}" points="'
        + " ".join(at(*point).replace(" ", ",") for point in zip(shares, line, strict=True))
        + '"/>'
        for number, line in enumerate(lines)
    ]
    x, y = at(told["kept_share"], min(max(told["loss"]["pruned"], low), high)).split()
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss against heads kept">'
        f'<path d="M{LEFT} 16V{HEIGHT - BOTTOM}H{WIDTH - 16}"/>{"".join(marks)}{"".join(drawn)}'
        f'<circle cx="{x}" cy="{y}" r="5"/>'
        f'<text x="{WIDTH - 16}" y="{HEIGHT - 8}" text-anchor="end">share of the {curve["heads"]} heads kept</text>'
        f'<text x="8" y="12">loss, nats</text></svg>'
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ --paper: #fbfaf7; --ink: #1c1b19; --faint: #6b675f; --line: #d8d4ca; --own: #0072b2; --warm: #b04a00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #15171a; --ink: #ebe8e2; --faint: #a09b91; --line: #3a3d42; --own: #56b4e9; --warm: #e69f00; }} }}
body {{ margin: 0 auto; max-width: 760px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }}
h1 {{ font-size: 24px; }} table {{ border-collapse: collapse; width: 100%; }} tr {{ border-bottom: 1px solid var(--line); }}
td, th {{ padding: 4px 12px 4px 0; text-align: left; }} .n {{ text-align: right; }} .faint {{ color: var(--faint); }}
svg text {{ fill: var(--faint); font-size: 12px; }} svg path {{ fill: none; stroke: var(--line); }}
polyline {{ fill: none; stroke-width: 2; }} .own {{ stroke: var(--own); }}
.random {{ stroke: var(--faint); stroke-dasharray: 4 4; }} circle {{ fill: var(--warm); }}
</style></head><body><h1>{title}</h1><p>{summary}</p>
<table><tr><th></th><th class=n>before</th><th class=n>after</th></tr>{rows}</table>
{plot}
<p class="faint">Line: single heads are gated off, those of least importance first. Dashed: in random orders. Dot: the model
that was saved, which loses whole groups, as many in every layer. Loss on text that did not choose the heads.</p>
</body></html>
"""
