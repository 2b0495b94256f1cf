"""The page's drawing in a plain JavaScript engine: it matches the screen and the numbers, and needs no browser."""

import base64
import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest

from page_fixture import (
    SENTENCE,
    attention_entry,
    blob_entry,
    decoder_recording,
    draw_arguments,
    encoder_recording,
    merged,
    page_script,
    payload_of,
    saved_html,
    side,
    translation_recording,
)

pytest_plugins = ["page_browser"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="session")
def draw():
    quickjs = pytest.importorskip("quickjs", reason="needs tool: quickjs-ng")
    context = quickjs.Context()
    context.eval(page_script())
    function = context.get("regardDraw")
    return lambda payload, blobs, **options: function(*draw_arguments(payload, blobs, **options))


def lines_of(svg):
    paths = ElementTree.fromstring(svg).iter(f"{SVG}path")
    return [
        {name: float(path.get(f"data-{name}")) for name in ("from", "to", "weight")}
        | {"width": float(path.get("stroke-width"))}
        for path in paths
        if path.get("data-from")
    ]


def texts_of(svg):
    return ["".join(text.itertext()) for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280, 2560])
def test_the_drawing_is_well_formed_and_shows_every_word(draw, theme, width):
    svg = draw(*encoder_recording(8), theme=theme, width=width)
    root = ElementTree.fromstring(svg)
    assert root.get("width") == str(width)
    texts = texts_of(svg)
    for word in SENTENCE.split():
        assert word in texts
    assert "= 100 %" in texts


def test_the_thickest_line_is_the_largest_merged_weight(draw):
    recording = encoder_recording(8)
    lines = lines_of(draw(*recording))
    row = merged(*recording, 0, 5, 11)[8]
    thickest = max(lines, key=lambda line: line["width"])
    assert thickest["to"] == np.argmax(row) == 2
    for line in lines:
        assert line["weight"] == pytest.approx(row[int(line["to"])], abs=1e-6)
        assert line["width"] == pytest.approx(14 * line["weight"], abs=1e-4)


def test_an_address_chooses_what_is_drawn(draw):
    svg = draw(*translation_recording(), view="#l=1&h=2&a=2&w=1.3&how=1")
    assert {line["from"] for line in lines_of(svg)} == {3}
    assert "klettert" in texts_of(svg) and any(text.startswith("1  q · k = ") for text in texts_of(svg))


def test_a_map_is_drawn_from_every_weight(draw):
    payload, blobs = encoder_recording(8)
    root = ElementTree.fromstring(draw(payload, blobs, view="#l=5&h=11&w=0.8&view=map"))
    group = next(g for g in root.iter(f"{SVG}g") if g.get("aria-label") == "map")
    cells = sum(path.get("d").count("M") for path in group.iter(f"{SVG}path") if path.get("fill") not in (None, "none"))
    assert cells >= (merged(payload, blobs, 0, 5, 11) > 1 / 255).sum()


def test_the_heads_are_a_png_that_decodes(draw):
    svg = draw(*encoder_recording(8))
    data = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", svg)[1]
    png = base64.b64decode(data, validate=True)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        size, name = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + size]
        assert zlib.crc32(name + body) == struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0]
        chunks[name] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    thumbs = encoder_recording()[1]["thumbs/0"]
    assert set(raw[:, 0]) == {0}
    assert raw[:, 1:].max() == thumbs.max()


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_half_precision_blobs_are_read(draw, dtype):
    payload, blobs = encoder_recording(8)
    small = {key: blob if blob.dtype == "u1" else blob.astype(dtype) for key, blob in blobs.items()}
    row = merged(payload, small, 0, 5, 11)[8]
    for line in lines_of(draw(payload, small)):
        assert line["weight"] == pytest.approx(row[int(line["to"])], abs=1e-9)


def test_a_blob_of_the_wrong_length_is_refused_in_words(draw):
    import quickjs

    payload, blobs = encoder_recording(8)
    bad = {**blobs, "weights/0/5": blobs["weights/0/5"]}
    arguments = list(draw_arguments(payload, bad))
    broken = json.loads(arguments[1])
    broken["weights/0/5"]["shape"] = [12, 13, 14]
    context = quickjs.Context()
    context.eval(page_script())
    with pytest.raises(quickjs.JSException, match="blob: shape 12 × 13 × 14 of f32 needs 8736 bytes; got 8112"):
        context.get("regardDraw")(arguments[0], json.dumps(broken), arguments[2])


def test_words_of_any_script_and_markup_stay_well_formed(draw):
    words = ["<b>&amp;\"'", "日本語", "نص", "e\u0301", "👩‍🚀", "\u0007bell", "x" * 300, "\n", ""]
    one = side("text", words)
    n = len(words)
    weights = np.full((1, n, n), 1 / n, "<f4")
    payload = payload_of(
        [one],
        [attention_entry(num_heads=1, num_kv_heads=1, layers=[0])],
        text="any",
        name="any <model>",
        selection={"attention": 0, "layer": 0, "head": 0, "word": 1, "target": None},
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
    )
    blobs = {"weights/0/0": weights, "thumbs/0": np.zeros((1, 1, n, n), "u1")}
    for width in (320, 1280):
        texts = texts_of(draw(payload, blobs, width=width))
        assert "日本語" in texts and any(text.startswith("<b>") for text in texts)


def test_a_row_without_keys_and_a_missing_layer_are_drawn_as_such(draw):
    payload, blobs = encoder_recording(8)
    empty = blobs["weights/0/5"].copy()
    empty[11, 8] = 0
    texts = texts_of(draw(payload, {**blobs, "weights/0/5": empty}))
    assert "nothing: every key is masked" in texts
    without = {key: blob for key, blob in blobs.items() if key != "weights/0/5"}
    assert "are not in this file" in " ".join(texts_of(draw(payload, without)))


def test_the_same_numbers_give_the_same_bytes(draw):
    assert draw(*decoder_recording(), view="#l=2&h=4&w=0.30") == draw(*decoder_recording(), view="#l=2&h=4&w=0.30")


@pytest.mark.browser
@pytest.mark.parametrize(
    "view", ["#l=5&h=11&w=0.8&how=1", "#l=5&h=11&w=0.8&heads=5.11,3.1", "#l=5&h=11&w=0.2&mode=from"]
)
def test_the_drawing_matches_the_screen(draw, open_page, view):
    recording = encoder_recording()
    page = open_page(saved_html(*recording), view=view)
    page.locator("path[data-from]").first.wait_for(state="attached")
    page.wait_for_function("!document.querySelector('section.inspector').innerText.includes('Reading')")
    seen = page.locator("path[data-from]").evaluate_all(
        "p => p.map(x => [+x.dataset.from, +x.dataset.to, +x.dataset.weight, +x.getAttribute('stroke-width')])"
    )
    svg = draw(*recording, view=view)
    drawn = [[line["from"], line["to"], line["weight"], line["width"]] for line in lines_of(svg)]
    assert sorted(seen) == sorted(drawn)
    squeeze = lambda text: re.sub(r"\s+", "", text)  # noqa: E731
    written = squeeze("".join(texts_of(svg)))
    on_screen = page.locator(".sentence .t, section.inspector .t").all_inner_texts()
    assert len(on_screen) > 20
    words = {squeeze(word) for text in on_screen for word in text.split()}
    assert [word for word in words if word not in written] == []


def test_blob_entries_round_trip():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    entry = blob_entry(array, zipped=False)
    assert entry["shape"] == [2, 3] and np.array_equal(
        np.frombuffer(base64.b64decode(entry["data"]), "<f4").reshape(2, 3), array
    )
