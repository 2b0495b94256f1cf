"""What is shown and what is left out: shading, sinks, pooled heads, thresholds, spans, pins, sorted heads, cuts."""

import json
import re

import numpy as np
import pytest

from page_fixture import MEASURES, encoder_recording, merged, saved_html, translation_recording
from test_page import click_head, inspector, lines, press, settle, word
from test_page_live import Server, forget_expected

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

IT, CAT, TIRED = 8, 2, 10
AT = "#l=5&h=11"


@pytest.fixture
def encoder(open_page):
    page = open_page(saved_html(*encoder_recording()))
    page.locator("button.word").first.wait_for()
    return page


def words_of(recording, layer, head):
    return merged(*recording, 0, layer, head)


def show(page, **choices):
    page.get_by_text("what is shown").click()
    for label, value in choices.items():
        page.get_by_label(label.replace("_", " ")).select_option(value)
    settle(page)


def shades(page):
    return page.locator("button.word").evaluate_all(
        "b => b.map(x => { const i = x.querySelector('i'); return i ? +getComputedStyle(i).opacity : 0; })"
    )


def test_words_are_shaded_by_what_they_receive_and_by_what_they_give(encoder):
    page = encoder
    weights = words_of(encoder_recording(), 5, 11)
    show(page, shade="received")
    received = weights.mean(0)
    np.testing.assert_allclose(shades(page), 0.34 * received / received.max(), atol=0.006)
    assert "shaded by its share of all attention" in page.locator(".legend").inner_text()
    assert "shade=received" in page.url
    cat = word(page, CAT).inner_text()
    assert f"{round(100 * received[CAT])} %" in cat
    page.get_by_label("shade").select_option("given")
    settle(page)
    special = np.array([one["special"] for one in encoder_recording()[0]["sides"][0]["words"]])
    kept = weights * ~np.eye(12, dtype=bool) * ~special
    given = kept.sum(1)
    np.testing.assert_allclose(shades(page), 0.34 * given / given.max(), atol=0.006)


@pytest.fixture
def with_sink(open_page):
    """The encoder, but for one head that gives its first token half of everything."""
    payload, blobs = encoder_recording()
    weights = blobs["weights/0/5"].copy()
    weights[11] *= 0.5
    weights[11, :, 0] += 0.5
    return payload, {**blobs, "weights/0/5": weights}


def test_sinks_are_hidden_and_the_rest_is_scaled_up(with_sink, open_page):
    page = open_page(saved_html(*with_sink), view=f"{AT}&w=0.{IT}")
    inspector(page).get_by_role("button", name=re.compile("sink")).wait_for()
    page.get_by_text("what is shown").click()
    page.get_by_label("hide sinks and scale the rest up").check()
    settle(page)
    row = words_of(with_sink, 5, 11)[IT].copy()
    row[0] = 0
    row /= row.sum()
    drawn = lines(page)
    assert 0 not in {line["to"] for line in drawn}
    for line in drawn:
        assert line["weight"] == pytest.approx(row[line["to"]], abs=1e-6)
    assert "= 100 % of what is not the sink’s" in inspector(page).inner_text()
    assert "sinks=0" in page.url
    assert "Sinks are hidden" in page.locator(".legend").inner_text()


@pytest.mark.parametrize("over", ["layer-mean", "layer-max", "all-mean", "all-max"])
def test_heads_and_layers_are_put_together_exactly(open_page, over):
    payload, blobs = encoder_recording()
    page = open_page(saved_html(payload, blobs), view=f"{AT}&w=0.{IT}&over={over}")
    page.locator("path[data-from]").first.wait_for(state="attached")
    stack = np.stack([blobs[f"weights/0/{layer}"] for layer in ([5] if "layer" in over else range(6))]).astype(float)
    pooled = stack.mean((0, 1)) if over.endswith("mean") else stack.max((0, 1))
    row = words_of((payload, {"weights/0/0": pooled[None]}), 0, 0)[IT]
    for line in lines(page):
        assert line["weight"] == pytest.approx(row[line["to"]], abs=1e-6)
    assert lines(page)
    assert page.get_by_role("button", name=re.compile("came about")).count() == 0


def test_how_many_lines_and_from_which_weight_is_chosen(encoder):
    page = encoder
    word(page, IT).click()
    page.get_by_text("what is shown").click()
    row = words_of(encoder_recording(), 5, 11)[IT]
    page.get_by_label("at most").fill("3")
    page.get_by_label("at most").press("Tab")
    settle(page)
    assert {line["to"] for line in lines(page)} == set(np.argsort(-row)[:3].tolist())
    page.get_by_label("at most").fill("40")
    page.get_by_label("from", exact=False).fill("5")
    page.get_by_label("from", exact=False).press("Tab")
    settle(page)
    assert {line["to"] for line in lines(page)} == set(np.flatnonzero(row >= 0.05).tolist())
    assert "top=40" in page.url and "least=0.05" in page.url
    page.go_back()
    settle(page)
    assert "least" not in page.url


def test_special_tokens_are_put_away(encoder):
    page = encoder
    word(page, IT).click()
    page.get_by_text("what is shown").click()
    page.get_by_label("special tokens").uncheck()
    settle(page)
    assert page.locator("button.word").count() == 10
    assert not {line["to"] for line in lines(page)} & {0, 11}
    assert "= 100 %" in inspector(page).inner_text()


def test_a_span_is_pinned_as_one_and_its_rows_are_averaged(encoder, open_page):
    page = encoder
    word(page, 3).click()
    word(page, 5).click(modifiers=["Shift"])
    page.mouse.move(5, 5)
    settle(page)
    mean = words_of(encoder_recording(), 5, 11)[3:6].mean(0)
    drawn = [line for line in lines(page) if line["from"] == 3]
    assert drawn
    for line in drawn:
        assert line["weight"] == pytest.approx(mean[line["to"]], abs=1e-6)
    assert "pins=0.3-5" in page.url
    assert "sat on the" in inspector(page).inner_text()
    pressed = page.locator('button.word[aria-pressed="true"]').evaluate_all("b => b.map(x => +x.dataset.word)")
    assert pressed == [3, 4, 5]
    again = open_page(saved_html(*encoder_recording()), view="#" + page.url.split("#")[1])
    again.locator("path[data-from]").first.wait_for(state="attached")
    assert [line["weight"] for line in lines(again)] == [line["weight"] for line in lines(page)]


def test_two_pins_are_compared_number_by_number(encoder):
    page = encoder
    word(page, IT).click()
    word(page, CAT).click()
    page.mouse.move(5, 5)
    settle(page)
    weights = words_of(encoder_recording(), 5, 11)
    text = inspector(page).inner_text().replace("\n", " ")
    assert "1: it" in text and "2: cat" in text
    for asker, at in (("1", IT), ("2", CAT)):
        best = int(np.argmax(weights[at]))
        assert re.search(rf"{asker} {round(100 * weights[at, best])} %", text)


@pytest.mark.parametrize("name", MEASURES)
def test_heads_are_sorted_by_what_they_do(open_page, name):
    payload, blobs = encoder_recording()
    page = open_page(saved_html(payload, blobs), view=f"{AT}&view=heads")
    page.get_by_label("sort by").select_option(name)
    page.get_by_role("group", name="heads, largest first").wait_for(state="attached")
    order = page.locator("button.head").evaluate_all("b => b.map(x => [+x.dataset.layer, +x.dataset.head])")
    values = [float(blobs["measures/0"][MEASURES.index(name), layer, head]) for layer, head in order]
    assert len(order) == 72 and values == sorted(values, reverse=True)
    shown = page.locator(".bighead").inner_text()
    best = values[0]
    number = f"{round(100 * best)} %" if name not in ("entropy", "distance") else f"{best:.4g}"
    assert number[:4] in shown
    assert f"sort={name}" in page.url


def test_scores_that_came_with_the_recording_sort_too(open_page):
    payload, blobs = encoder_recording()
    scores = np.random.default_rng(0).random((6, 12)).round(3)
    page = open_page(saved_html({**payload, "head_scores": {"induction": scores.tolist()}}, blobs), view="#view=heads")
    page.get_by_label("sort by").select_option("induction")
    page.get_by_role("group", name="heads, largest first").wait_for(state="attached")
    order = page.locator("button.head").evaluate_all("b => b.map(x => [+x.dataset.layer, +x.dataset.head])")
    assert [scores[layer, head] for layer, head in order] == sorted(scores.ravel(), reverse=True)


def answer_of(size, *, error=None):
    if error:
        return 422, {"error": error}, None
    change = {"id": 7, "text": " mat", "before": 0.6, "after": 0.45}
    control = {"low": 0.001, "median": 0.002, "high": 0.01, "mass": 0.6, "count": 20}
    effect = {"cuts": [], "weight": 0.68, "mass": 0.68, "size": size, "before": 0.6, "after": 0.45,
              "changed": [change], "control": control}  # fmt: skip
    told = {"task": "next", "measure": "KL divergence, nats", "position": 11, "target": change,
            "likeliest": [change], "effects": [effect]}  # fmt: skip
    return 200, told, None


@pytest.fixture
def server():
    payload, blobs = encoder_recording(IT)
    one = Server({**payload, "asks": ["effects"]}, blobs)
    yield one
    one.close()


def test_a_cut_shows_weight_effect_and_control_side_by_side(open_page, server):
    page = open_page(address=server.address, view=f"{AT}&w=0.{IT}&view=effects")
    page.get_by_role("region", name="effects").get_by_text("Nothing is cut yet").wait_for()
    server.answers += [answer_of(0.074), answer_of(0.004), answer_of(0, error="This cannot be cut.")]
    page.get_by_role("button", name="cut this line").click()
    region = page.get_by_role("region", name="effects")
    region.get_by_text("changes more than they do").wait_for()
    asked = json.loads(server.asked[0])
    assert asked["cuts"] == [[{"type": "edge", "attention": 0, "layer": 5, "head": 11, "query": IT, "key": CAT}]]
    assert asked["ablation"] == "zero" and asked["renormalise"] is False and asked["text"].startswith("The cat")
    text = region.inner_text().replace("\n", " ")
    assert "“it” → “cat” in layer 5 head 11" in text
    assert "68 %" in text and "0.074" in text and "60 % before, 45 % after" in text
    widths = region.locator("i").evaluate_all("i => i.map(x => x.getBoundingClientRect().width)")
    weight, band, effect = widths[:3]
    assert effect / weight == pytest.approx(0.074 / 0.68, rel=0.02)
    assert band / weight == pytest.approx(0.009 / 0.68, rel=0.05)
    page.get_by_label("a cut").select_option("mean")
    page.get_by_label("scale the other weights up").check()
    page.get_by_role("button", name="cut this head").click()
    region.get_by_text("changes no more than they do").wait_for()
    asked = json.loads(server.asked[1])
    assert asked["cuts"] == [[{"type": "head", "attention": 0, "layer": 5, "head": 11}]]
    assert asked["ablation"] == "mean" and asked["renormalise"] is True
    page.get_by_role("button", name="cut this word").click()
    region.get_by_text("This cannot be cut.").wait_for()
    assert json.loads(server.asked[2])["cuts"] == [[{"type": "span", "side": 0, "start": IT, "stop": IT + 1}]]
    forget_expected(open_page, "422")
    forget_expected(open_page, "404")


def test_a_recording_cannot_be_cut_and_says_so(open_page):
    page = open_page(saved_html(*encoder_recording()), view="#view=effects")
    page.get_by_text("Cutting needs the model itself").wait_for()


def test_a_head_chosen_in_the_grid_is_the_one_that_is_pooled_no_more(encoder):
    page = encoder
    word(page, IT).click()
    show(page, weights_of="layer-mean")
    assert "mean of the layer" in inspector(page).inner_text()
    page.get_by_label("weights of").select_option("")
    click_head(page, 3, 1)
    row = words_of(encoder_recording(), 3, 1)[IT]
    assert all(line["weight"] == pytest.approx(row[line["to"]], abs=1e-6) for line in lines(page))


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("recording", [encoder_recording, translation_recording])
def test_nothing_sticks_out(open_page, width, recording):
    page = open_page(saved_html(*recording()), width=width, view="#view=sentence&shade=received")
    page.locator("button.word").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    press(page, "4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_two_texts_are_compared_word_by_word(open_page, server):
    server.payload["asks"] = ["compare"]
    rng = np.random.default_rng(1)
    words = ["The", "sat", "on", "it"]
    first, second = rng.random((2, 4, 4)).round(3)
    told = {"text": "The dog sat on it", "model": "another", "words": words, "first": first.tolist(),
            "second": second.tolist(), "only_first": ["cat"], "only_second": ["dog"]}  # fmt: skip
    server.answers += [(200, told, None), (422, {"error": "Texts must have two words in common."}, None)]
    page = open_page(address=server.address, view=f"{AT}&view=compare")
    page.get_by_label("compare with").fill("The dog sat on it")
    page.get_by_label("compare with").press("Enter")
    region = page.get_by_role("region", name="comparison")
    region.get_by_text("What changes most").wait_for()
    asked = json.loads(server.asked[0])
    assert asked == {"other": "The dog sat on it", "attention": 0, "layer": 5, "head": 11}
    text = region.inner_text().replace("\n", " ")
    change = second - first
    row, col = np.unravel_index(np.abs(change).argmax(), change.shape)
    assert f"{words[row]} → {words[col]}" in text
    shown = [int(100 * one[row, col] + 0.5) for one in (first, second)]
    assert f"{shown[0]} % → {shown[1]} %" in text
    assert "first: cat; second: dog" in text
    assert "second, another" in text
    canvas = region.get_by_role("img", name="second map")
    pixels = np.array(canvas.evaluate("c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data]"), float)
    dark = pixels.reshape(4, 4, 4)[..., :3].sum(-1)
    assert np.unravel_index(dark.argmin(), (4, 4)) == np.unravel_index(
        second.argmax() if second.max() > first.max() else dark.argmin(), (4, 4)
    )
    signs = region.locator("path[data-change]").evaluate_all("p => p.map(x => x.dataset.change.split('/')[0])")
    assert set(signs) == {"hue0", "hue1"}
    assert "with=The%20dog%20sat%20on%20it" in page.url
    page.get_by_role("button", name="Sentence", exact=True).click()
    click_head(page, 3, 1)
    page.get_by_role("button", name="Compare", exact=True).click()
    region.get_by_text("Texts must have two words in common.").wait_for()
    assert json.loads(server.asked[1])["layer"] == 3
    forget_expected(open_page, "422")
    forget_expected(open_page, "404")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_what_is_new(open_page, server, theme):
    from test_page_access import WEB, serious

    source = WEB / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        pytest.skip("needs tool: axe-core (npm ci in web/)")
    axe = source.read_text(encoding="utf-8")
    server.payload["asks"] = ["compare", "effects"]
    weights = merged(*encoder_recording(), 0, 5, 11)[:4, :4].tolist()
    told = {"text": "x", "model": "another", "words": list("abcd"), "first": weights, "second": weights[::-1],
            "only_first": [], "only_second": []}  # fmt: skip
    server.answers += [answer_of(0.05), (200, told, None)]
    view = f"{AT}&w=0.{IT}&pins=0.{IT},0.3-5&shade=received"
    page = open_page(address=server.address, view=view, theme=theme)
    page.locator("path[data-from]").first.wait_for(state="attached")
    assert serious(page, axe) == []
    press(page, "4")
    page.get_by_role("button", name="cut this line").click()
    page.get_by_text("changes more than they do").wait_for()
    assert serious(page, axe) == []
    press(page, "5")
    page.get_by_label("compare with").press("Enter")
    page.get_by_text("What changes most").wait_for()
    assert serious(page, axe) == []
    page.get_by_role("button", name="Heads", exact=True).click()
    page.get_by_label("sort by").select_option("entropy")
    settle(page)
    assert serious(page, axe) == []
    forget_expected(open_page, "404")
