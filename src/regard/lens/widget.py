"""The page in a notebook.

Enters: a look, or a recording with the tokenizer that names its tokens.
Leaves: a Jupyter widget: the same page as `regard look --save` writes, with its numbers inside; no server, no network.
Floor 6: anywidget; stands on the saved page."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from regard.lens.export import page_html
from regard.lens.look import Look
from regard.lens.opened import look_at
from regard.lens.payload import first_selection, payload, saved
from regard.lens.recording import Recording

# The page stands in a frame of its own: its styles and keys stay with it.
SCRIPT = """
export default { render({ model, el }) {
  const frame = document.createElement("iframe");
  const fill = () => { frame.srcdoc = model.get("html"); frame.style.height = `${model.get("height")}px`; };
  Object.assign(frame.style, { width: "100%", border: "0" });
  frame.title = "regard";
  model.on("change:html", fill);
  model.on("change:height", fill);
  fill();
  el.append(frame);
} };
"""


class Page(anywidget.AnyWidget):
    """A look as a widget.

    Args:
        source: a `Look`, or a `Recording`.
        layer: open on this layer. Default: that of the strongest link.
        head: open on this head. Default likewise.
        tokenizer: what names the tokens of a recording. Default: the model's, where it is on this machine.
        height: of the frame, in pixels. Default 640.

    Raises:
        ValueError: a layer or head that there is not.
    """

    _esm = SCRIPT
    html = traitlets.Unicode("").tag(sync=True)
    height = traitlets.Int(640).tag(sync=True)

    def __init__(
        self,
        source: Look | Recording,
        layer: int | None = None,
        head: int | None = None,
        *,
        tokenizer: Any = None,
        height: int = 640,
    ) -> None:
        look = source if isinstance(source, Look) else look_at(source, tokenizer=tokenizer)
        page = saved(payload(look, first_selection(look, layer, head, None)), look)
        super().__init__(html=page_html(page), height=height)
