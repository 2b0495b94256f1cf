"""A recording's weights as a figure for a paper.

Enters: a recording, a layer and head, and which rows and columns.
Leaves: matplotlib axes with the exact weights as an image and the tokens as labels.
Floor 5: stands on what gives weights; matplotlib loads when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABELLED = 64  # tokens up to which each has its name on the axis
MOST = 16_777_216  # weights in one figure: more than it has pixels


def plot(
    recording: Any,
    layer: Any,
    head: int | None = None,
    rows: slice = slice(None),
    cols: slice = slice(None),
    *,
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    ax: Any = None,
    **which: Any,
) -> Any:
    """Draw one head's weights, or the mean over a layer's heads.

    Args:
        recording: the recording.
        layer: as in `Recording.weights`.
        head: query head; None draws the mean over heads.
        rows: which queries. Default all.
        cols: which keys. Default all.
        tokens: names of the queries, from the first one on. Default none.
        key_tokens: names of the keys; default `tokens`.
        ax: matplotlib axes to draw on. Default new ones.
        which: kind, step and batch, as in `Recording.weights`.

    Returns:
        The axes; `ax.figure.savefig("map.pdf")` writes them.

    Raises:
        ValueError: more weights than a figure can hold, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plot: matplotlib must be installed; got none. Run: pip install matplotlib.") from None
    record = recording.layer(layer, which.get("kind", "self"))
    size = [sum(step.seq_len_q for step in record.steps), record.steps[-1].seq_len_kv]
    down, across = range(size[0])[rows], range(size[1])[cols]
    if len(down) * len(across) > MOST:
        raise ValueError(
            f"plot: rows and cols must hold at most {MOST} weights; got {len(down)} x {len(across)}. "
            "Choose a part, or look at the map with regard look."
        )
    weights = recording.weights(layer, head, rows, cols, **which)
    weights = weights if head is not None else weights.mean(0)
    if ax is None:
        ax = Figure(figsize=(4.8, 4.2), layout="constrained").subplots()
    image = ax.imshow(
        weights.numpy(), cmap="viridis", vmin=0.0, interpolation="nearest", aspect="auto",
        extent=(across.start - 0.5, across.stop - 0.5, down.stop - 0.5, down.start - 0.5),
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, label="weight")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"layer {record.number}, {'mean over heads' if head is None else f'head {head}'}")
    keys = tokens if key_tokens is None else key_tokens
    if tokens is not None and len(down) <= LABELLED:
        ax.set_yticks(list(down), [tokens[at] for at in down])
    if keys is not None and len(across) <= LABELLED:
        ax.set_xticks(list(across), [keys[at] for at in across], rotation=90)
    return ax
