"""A look as one file: .html, .svg, .png, .json, .parquet or .session.

Enters: a `Look` and the page's JSON.
Leaves: a self-contained page, the page's own drawing as SVG or PNG, the numbers of this view as JSON or as a table, or
a session: what the page holds and shows, which opens to the same view and draws the same picture.
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

import torch

from regard.lens.links import word_row, word_weights
from regard.lens.look import Look
from regard.lens.payload import FORMAT, NUMBERS, Blob, blob, looked_at, saved, unpacked

FORMATS = (".html", ".svg", ".png", ".json", ".parquet", ".session")
SESSIONS = (".session", ".html")
SLOT = '<script type="application/json" id="regard-payload">null</script>'
SCRIPT = '<script id="regard-script">'
FONT = "DejaVu Sans"  # where it is not there, resvg takes another
LARGEST_SCRIPT = 512_000_000
LONGEST_DRAWING = 60
MOST_PAIRS = 4_000_000  # rows of a table


def check_target(path: Path) -> None:
    """Refuse a place that `write` could not fill, before any work is done.

    Raises:
        ValueError: an ending that is not a format, or a folder that is not there.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"look: --save must end in .html, .svg, .png, .json, .parquet or .session; got {path.name}. "
            "Choose one of those endings."
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
        path: where to; its ending is one of `FORMATS`.
        look: the recording.
        page: what `regard.lens.payload.payload` gave.

    Raises:
        ValueError: another ending, or a folder that is not there.
    """
    check_target(path)
    make = {
        ".html": _html,
        ".svg": lambda look, page: draw(look, page).encode("utf-8"),
        ".png": lambda look, page: painted(draw(look, page)),
        ".json": _json,
        ".parquet": _parquet,
        ".session": lambda look, page: script_json(saved(page, look)).encode("utf-8"),
    }[path.suffix.lower()]
    replace(path, make(look, page))


def read_session(path: Path) -> dict[str, Any]:
    """The page's JSON of a session, or of a saved page.

    Args:
        path: a .session or .html file that regard wrote.

    Raises:
        ValueError: another file, a newer one, or one that is cut short.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix.lower() == ".html":
            text = text.partition(SLOT.partition("null")[0])[2].partition("</script>")[0]
        page = json.loads(text)
        if page["format"] != FORMAT or not isinstance(page["blobs"], dict):
            raise ValueError(f"its format is {page['format']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as broken:
        why = f"no {broken}" if isinstance(broken, KeyError) else str(broken).rstrip(".")
        raise ValueError(
            f"look: session must be a file that regard saved; got {path}, which is not whole ({why}). Save it again."
        ) from None
    return page


def write_session(path: Path, page: dict[str, Any]) -> None:
    """Write an opened session as a page, a picture, or a session again.

    Raises:
        ValueError: another ending: numbers need the recording itself.
    """
    check_target(path)
    ending = path.suffix.lower()
    if ending in (".json", ".parquet"):
        raise ValueError(
            f"look: --save of a session must end in .html, .svg, .png or .session; got {path.name}. "
            "Run regard look with the text for its numbers."
        )
    made = {
        ".html": lambda: page_html(page).encode("utf-8"),
        ".svg": lambda: draw_session(page).encode("utf-8"),
        ".png": lambda: painted(draw_session(page)),
        ".session": lambda: script_json(page).encode("utf-8"),
    }[ending]()
    replace(path, made)


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
    chosen = page["selection"]
    keys = [f"{name}/{index}" for index in range(len(look.attentions)) for name in ("thumbs", "measures")]
    keys += [f"{name}/{chosen['attention']}/{chosen['layer']}" for name in NUMBERS]
    numbers = {key: blob(look, key) for key in keys}
    if look.long(chosen["attention"]):
        numbers |= looked_at(look, chosen["attention"], chosen)
    return _drawn(page, {key: one for key, one in numbers.items() if one is not None}, width, theme)


def draw_session(page: dict[str, Any], width: int = 1280, theme: str = "light") -> str:
    """A session's view as SVG: the same bytes that the look it was saved from gives.

    Args:
        page: from `read_session`.
        width: in pixels. Default 1280.
        theme: "light" or "dark".
    """
    return _drawn(page, {key: unpacked(one) for key, one in page["blobs"].items()}, width, theme)


def _drawn(page: dict[str, Any], numbers: dict[str, Blob], width: int, theme: str) -> str:
    try:
        import quickjs
    except ImportError:
        raise ValueError(
            "look: --save to .svg or .png must be drawn with quickjs-ng; got none. Run: pip install 'regard[look]'."
        ) from None
    blobs = {
        key: {"shape": one.shape, "dtype": one.dtype, "data": base64.b64encode(one.bytes()).decode("ascii")}
        for key, one in numbers.items()
    }
    page = {name: held for name, held in page.items() if name != "blobs"}
    options = {"width": width, "theme": theme, "view": page.get("view")}
    context = quickjs.Context()
    context.set_memory_limit(LARGEST_SCRIPT)
    context.set_time_limit(LONGEST_DRAWING)
    context.eval(page_script())
    svg = context.get("regardDraw")(json.dumps(page), json.dumps(blobs), json.dumps(options))
    assert isinstance(svg, str)
    return svg


def _html(look: Look, page: dict[str, Any]) -> bytes:
    return page_html(saved(page, look)).encode("utf-8")


def painted(svg: str) -> bytes:
    """A drawing as PNG, two pixels for each of its own.

    Raises:
        ValueError: resvg_py or a font is missing.
    """
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
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, **options))


def _json(look: Look, page: dict[str, Any]) -> bytes:
    """The numbers of this view: the chosen head from word to word, as the page's own JSON has them."""
    chosen = page["selection"]
    attention = look.attentions[chosen["attention"]]
    queries, keys = look.sides[attention.query_side].words, look.sides[attention.key_side].words
    long = look.long(chosen["attention"])
    weights = None if long else word_weights(look, chosen["attention"], chosen["layer"], chosen["head"])
    links = []
    if chosen["word"] is not None:
        row = word_row(look, chosen["attention"], chosen["layer"], chosen["head"], chosen["word"])
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
            {
                "layer": chosen["layer"],
                "head": chosen["head"],
                "weights": None if weights is None else weights.tolist(),
                "links": links,
            },
        ],
        "found": page["found"],
    }
    return (json.dumps(view, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode("utf-8")


def _parquet(look: Look, page: dict[str, Any]) -> bytes:
    """A row for each pair of words in each head of the shown attention, as a Parquet table."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            "look: --save to .parquet must be written with pyarrow; got none. Run: pip install pyarrow."
        ) from None
    index = page["selection"]["attention"]
    attention = look.attentions[index]
    queries, keys = look.sides[attention.query_side].words, look.sides[attention.key_side].words
    pairs = len(attention.layers) * attention.num_heads * len(queries) * len(keys)
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"look: --save to .parquet must have at most {MOST_PAIRS} pairs of words over all heads; got {pairs}. "
            "Take a shorter text."
        )
    heads = [(number, head) for number in attention.numbers for head in range(attention.num_heads)]
    weights = [word_weights(look, index, number, head).flatten() for number, head in heads]
    each = len(queries) * len(keys)
    columns = {
        "layer": [number for number, _ in heads for _ in range(each)],
        "head": [head for _, head in heads for _ in range(each)],
        "query": [row for row in range(len(queries)) for _ in keys] * len(heads),
        "key": list(range(len(keys))) * (len(queries) * len(heads)),
        "query_text": [word.text for word in queries for _ in keys] * len(heads),
        "key_text": [word.text for word in keys] * (len(queries) * len(heads)),
        "weight": torch.cat(weights).float().numpy(),
    }
    facts = {"model": page["model"]["name"], "text": page["text"], "attention": attention.label}
    table = pyarrow.table(columns).replace_schema_metadata(facts)
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()
