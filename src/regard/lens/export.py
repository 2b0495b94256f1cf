"""A look as one file: .html, .svg, .png or .json.

Enters: a `Look` and the page's JSON.
Leaves: a self-contained page, the page's own drawing as SVG or PNG, or the numbers of this view.
Written beside its place and renamed into it: never half a file.
Floor 6: stands on the built page; SVG is drawn by the page's code in QuickJS, PNG by resvg."""

from __future__ import annotations

import base64
import json
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

from regard.lens.links import word_weights
from regard.lens.look import Look
from regard.lens.payload import NUMBERS, blob, saved

FORMATS = (".html", ".svg", ".png", ".json")
SLOT = '<script type="application/json" id="regard-payload">null</script>'
SCRIPT = '<script id="regard-script">'
FONT = "DejaVu Sans"  # where it is not there, resvg takes another
LARGEST_SCRIPT = 512_000_000
LONGEST_DRAWING = 60


def check_target(path: Path) -> None:
    """Refuse a place that `write` could not fill, before any work is done.

    Raises:
        ValueError: an ending that is not a format, or a folder that is not there.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"look: --save must end in .html, .svg, .png or .json; got {path.name}. Choose one of those endings."
        )
    if path.is_dir():
        raise ValueError(f"look: --save must be a file; got the directory {path}. Add a name.")
    if not path.parent.is_dir():
        raise ValueError(f"look: --save must lie in a directory that exists; got {path}. Make {path.parent} first.")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"look: --save must lie where you may write; got {path}. Choose another directory.")


def write(path: Path, look: Look, page: dict[str, Any]) -> None:
    """Write one view as a file, whole or not at all; its ending says as what.

    Args:
        path: where to: .html, .svg, .png or .json.
        look: the recording.
        page: what `regard.lens.payload.payload` gave.

    Raises:
        ValueError: another ending, or a folder that is not there.
    """
    check_target(path)
    make = {".html": _html, ".svg": _svg, ".png": _png, ".json": _json}[path.suffix.lower()]
    replace(path, make(look, page))


def page_html(page: dict[str, Any] | None = None) -> str:
    """The built page, with a saved recording in it, or live where there is none."""
    html = resources.files("regard.lens").joinpath("page/index.html").read_text("utf-8")
    if page is None:
        return html
    if html.count(SLOT) != 1:
        raise RuntimeError("page/index.html has no place for a recording. Build it again: make -C web")
    return html.replace(SLOT, SLOT.replace("null", script_json(page)))


def page_script() -> str:
    """The page's own code, which draws without a browser too."""
    return page_html().partition(SCRIPT)[2].partition("</script>")[0]


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def replace(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it into it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    place = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        place.chmod(0o666 & ~mask)
        place.replace(path)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


def draw(look: Look, page: dict[str, Any], width: int = 1280, theme: str = "light") -> str:
    """The view as SVG, drawn by the page's own code.

    Args:
        look: the recording.
        page: the page's JSON; its selection is what is drawn.
        width: in pixels. Default 1280.
        theme: "light" or "dark".
    """
    try:
        import quickjs
    except ImportError:
        raise ValueError(
            "look: --save to .svg or .png must be drawn with quickjs-ng; got none. Run: pip install 'regard[look]'."
        ) from None
    script = page_script()
    chosen = page["selection"]
    keys = [f"thumbs/{index}" for index in range(len(look.attentions))]
    keys += [f"{name}/{chosen['attention']}/{chosen['layer']}" for name in NUMBERS]
    blobs = {}
    for key in keys:
        one = blob(look, key)
        assert one is not None
        blobs[key] = {"shape": one.shape, "dtype": one.dtype, "data": base64.b64encode(one.bytes()).decode("ascii")}
    context = quickjs.Context()
    context.set_memory_limit(LARGEST_SCRIPT)
    context.set_time_limit(LONGEST_DRAWING)
    context.eval(script)
    svg = context.get("regardDraw")(json.dumps(page), json.dumps(blobs), json.dumps({"width": width, "theme": theme}))
    assert isinstance(svg, str)
    return svg


def _html(look: Look, page: dict[str, Any]) -> bytes:
    return page_html(saved(page, look)).encode("utf-8")


def _svg(look: Look, page: dict[str, Any]) -> bytes:
    return draw(look, page).encode("utf-8")


def _png(look: Look, page: dict[str, Any]) -> bytes:
    try:
        import resvg_py
    except ImportError:
        raise ValueError(
            "look: --save to .png must be painted with resvg_py; got none. Run: pip install 'regard[look]'."
        ) from None
    options = {"zoom": 2, "font_family": FONT, "sans_serif_family": FONT}
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20">{}</svg>'
    blank, letter = (frame.format(text) for text in ("", '<text y="15">w</text>'))
    if resvg_py.svg_to_bytes(svg_string=blank, **options) == resvg_py.svg_to_bytes(svg_string=letter, **options):
        raise ValueError(
            "look: --save to .png must find a font on this machine; got none. Install one (fonts-dejavu), or save .svg."
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=draw(look, page), **options))


def _json(look: Look, page: dict[str, Any]) -> bytes:
    """The numbers of this view: the chosen head from word to word, as the page's own JSON has them."""
    chosen = page["selection"]
    attention = look.attentions[chosen["attention"]]
    queries, keys = look.sides[attention.query_side].words, look.sides[attention.key_side].words
    weights = word_weights(look, chosen["attention"], chosen["layer"], chosen["head"])
    links = []
    if chosen["word"] is not None:
        row = weights[chosen["word"]]
        order = row.argsort(descending=True, stable=True).tolist()
        asked = [{"text": keys[at].text, "from": chosen["word"], "to": at, "weight": float(row[at])} for at in order]
        links.append({"word": queries[chosen["word"]].text, "index": chosen["word"], "links": asked})
    view = {
        "format": "regard-view/1",
        "version": page["version"],
        "model": page["model"],
        "text": page["text"],
        "notes": page["notes"],
        "attention": attention.label,
        "unit": "word",
        "mode": "to",
        "queries": [word.text for word in queries],
        "keys": [word.text for word in keys],
        "heads": [
            {"layer": chosen["layer"], "head": chosen["head"], "weights": weights.tolist(), "links": links},
        ],
        "found": page["found"],
    }
    return (json.dumps(view, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode("utf-8")
