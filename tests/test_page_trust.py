"""A real model behind the page: what its cuts change, which attribution to trust, and the twin sentences."""

import re
import threading

import pytest
import torch

from page_fixture import encoder_recording, saved_html
from test_page_live import Server, forget_expected
from tiny_folders import SENTENCE, make

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

AT = "#l=1&h=2"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from regard.lens.asking import ASKS
    from regard.lens.compare import Comparing
    from regard.lens.look import look
    from regard.lens.models import load
    from regard.lens.payload import first_selection, payload
    from regard.lens.server import View, bind, serve

    loaded = load(str(make(tmp_path_factory.mktemp("tiny") / "llama", "llama")))

    def run(text):
        seen = look(loaded, text)
        return View(seen, payload(seen, first_selection(seen, None, None, None), live=True))

    listening, ready = bind(None), threading.Event()
    arguments = (listening, run(SENTENCE), run, lambda _address: ready.set(), {**ASKS, "compare": Comparing()})
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    assert ready.wait(30)
    return f"http://127.0.0.1:{listening.getsockname()[1]}/", loaded


@pytest.fixture
def opened(open_page, served):
    """The Effects view with "it" in front; the server shows the sentence again, whatever a test read before."""
    import httpx

    httpx.post(served[0] + "api/run", json={"text": SENTENCE}).raise_for_status()

    def at(view="", **options):
        page = open_page(address=served[0], view=f"{AT}{view}&view=effects", **options)
        page.get_by_role("region", name="effects").wait_for()
        return page

    return at


def numbers(text):
    return [float(found.replace("−", "-")) for found in re.findall(r"−?\d+(?:\.\d+)?(?:e[−+]\d+)?", text)]


def inputs_of(loaded):
    from regard.lens.splitting import read_text

    return {"input_ids": torch.tensor([read_text(loaded.tokenizer, SENTENCE)[0]])}


def test_a_cut_on_the_page_is_the_cut_in_python(opened, served):
    from regard.lens import Head, Span, effects

    page, loaded = opened("&w=0.7"), served[1]
    region = page.get_by_role("region", name="effects")
    start, stop = page.evaluate("fetch('api/payload').then(r => r.json()).then(p => p.sides[0].words[7].tokens)")
    for name, cut in (("cut this head", Head(1, 2, "decoder")), ("cut this word", Span(start, stop))):
        found = effects(loaded.model, inputs_of(loaded), [cut], controls=20, tokenizer=loaded.tokenizer).effects[0]
        page.get_by_role("button", name=name).click()
        region.get_by_text("as a key, in every head" if "word" in name else "head 2 of layer 1").wait_for()
        region.get_by_text("Measuring").wait_for(state="detached")
        lines = region.locator(".t").all_inner_texts()
        assert numbers(lines[lines.index("effect") + 1])[0] == pytest.approx(found.size, rel=6e-3)
        band = list(numbers(" ".join(lines).partition("weight change, ")[2])[:2])
        if found.control:
            assert band == pytest.approx([found.control.low, found.control.high], rel=6e-3)
        said = " ".join(lines)
        assert f"{round(100 * found.before)} % before, {round(100 * found.after)} % after" in said
    page.get_by_label("a cut").select_option("mean")
    page.get_by_role("button", name="cut this head").click()
    region.get_by_text("replaced by its mean").wait_for()
    region.get_by_text("Measuring").wait_for(state="detached")
    mean = effects(loaded.model, inputs_of(loaded), [Head(1, 2, "decoder")], ablation="mean").effects[0]
    lines = region.locator(".t").all_inner_texts()
    assert numbers(lines[lines.index("effect") + 1])[0] == pytest.approx(mean.size, rel=6e-3)


def measured(page):
    """By name: removing and putting back, as they stand on the page."""
    lines = page.get_by_role("region", name="trust").locator(".picture > .t, .picture > button").all_inner_texts()
    found, name = {}, ""
    for at, line in enumerate(lines):
        if line.strip() in NAMES:
            name = line.strip()
        elif line in ("removing", "putting back"):
            found.setdefault(name, []).append(numbers(lines[at + 1])[0])
    return found


NAMES = ("raw weight", "weight × value norm", "rollout", "flow", "gradient × attention", "true deletion", "random",
         "uniform (reading order)")  # fmt: skip


def test_six_attributions_stand_beside_their_controls(opened, served):
    from regard.lens import trust

    page, loaded = opened(), served[1]
    expected = trust(loaded.model, inputs_of(loaded), tokenizer=loaded.tokenizer, randoms=8)
    region = page.get_by_role("region", name="trust")
    page.keyboard.press("Tab")
    button = region.get_by_role("button", name="put six attributions to the test")
    button.focus()
    page.keyboard.press("Enter")
    region.get_by_text("The grey band is what random orders give").first.wait_for()
    found = measured(page)
    assert set(found) == set(NAMES)
    for one in expected.attributions:
        name = "uniform (reading order)" if one.name == "uniform" else one.name
        assert found[name] == pytest.approx([one.deletion, one.insertion], rel=6e-3), name
    random = next(one for one in expected.attributions if one.name == "random")
    low, high = random.deletion_range
    assert low < random.deletion < high
    bars = region.locator(".picture > i").evaluate_all("i => i.map(x => x.getBoundingClientRect().width)")
    first = expected.attributions[0]
    assert bars[0] / bars[1] == pytest.approx((high - low) / first.deletion, abs=0.02)  # the band and raw weight's bar
    said = region.get_by_role("status").inner_text()
    better = said.partition("removing, ")[2].partition(";")[0]
    for one in expected.attributions[:6]:
        assert (one.name in better) == (one.deletion < low), one.name
    row = region.get_by_role("button", name="true deletion: scores of the tokens")
    row.focus()
    page.keyboard.press("Enter")
    assert row.get_attribute("aria-pressed") == "true"
    scores = expected.attributions[5].scores
    largest = max(scores, key=abs)
    lines = region.locator(".picture > .t").all_inner_texts()
    after = lines[lines.index("uniform (reading order)") - 2 * 8 - 1 : lines.index("uniform (reading order)")]
    assert any(numbers(line)[:1] == pytest.approx([largest], rel=6e-3) for line in after if numbers(line))


def test_another_answer_is_tested_and_a_refusal_is_said(opened, served, open_page):
    from regard.lens import trust

    loaded = served[1]
    page = opened("&w=0.7")
    region = page.get_by_role("region", name="trust")
    region.get_by_role("button", name="for what follows “it”").click()
    region.get_by_text("The grey band is what random orders give").first.wait_for()
    at = page.evaluate("fetch('api/payload').then(r => r.json()).then(p => p.sides[0].words[7].tokens[1] - 1)")
    second = region.get_by_label("answer").locator("option").nth(1).get_attribute("value")
    with page.expect_response("**/api/trust"):
        region.get_by_label("answer").select_option(second)
    region.get_by_text("some hundred runs").wait_for(state="detached")
    expected = trust(
        loaded.model, inputs_of(loaded), position=at, target=int(second), tokenizer=loaded.tokenizer, randoms=8
    )
    raw = expected.attributions[0]
    region.get_by_role("button", name="raw weight: scores").wait_for()
    assert measured(page)["raw weight"] == pytest.approx([raw.deletion, raw.insertion], rel=6e-3)
    page.get_by_role("button", name="The", exact=True).click()
    region.get_by_role("button", name="for what follows “The”").click()
    region.get_by_text("The text must have 2 to 256 tokens").wait_for()
    forget_expected(open_page, "422")


def test_the_twins_are_read_and_compared(opened):
    from regard.lens.probes import twins

    one, other = twins()[0]
    page = opened()
    region = page.get_by_role("region", name="trust")
    assert "turns with the meaning in 1 pair of 8" in region.inner_text()
    assert "knows" not in page.locator("main").inner_text()
    region.get_by_role("button", name="try a pair of sentences that differ at the end").click()
    region.get_by_text(other.text).wait_for()
    assert page.get_by_label("text", exact=True).input_value() == one.text
    assert page.evaluate("fetch('api/payload').then(r => r.json()).then(p => p.text)") == one.text
    assert re.search(r"w=0\.\d+", page.url) and "with=" in page.url
    region.get_by_role("button", name="read the twin").click()
    region.get_by_text(one.text).wait_for()
    assert page.get_by_label("text", exact=True).input_value() == other.text
    region.get_by_role("button", name="compare the two").click()
    page.get_by_role("region", name="comparison").get_by_text("What changes most").wait_for()


def test_a_wait_is_shown_and_a_stopped_server_is_said(open_page):
    payload, blobs = encoder_recording()
    server = Server({**payload, "asks": ["effects", "trust"], "twins": []}, blobs)
    try:
        server.wait.clear()
        page = open_page(address=server.address, view="#view=effects")
        region = page.get_by_role("region", name="trust")
        region.get_by_role("button", name="put six attributions to the test").click()
        region.get_by_text("some hundred runs of the model").wait_for()
        assert region.get_by_role("button", name="put six attributions to the test").is_disabled()
        server.answers.append((422, {"error": "Model must predict a token."}, None))
        server.wait.set()
        region.get_by_text("Model must predict a token.").wait_for()
        assert "try a pair" not in region.inner_text()
    finally:
        server.close()
    region.get_by_role("button", name="put six attributions to the test").click()
    region.get_by_text("the server is not running any more").wait_for()
    for part in ("422", "ERR_CONNECTION", "404"):
        forget_expected(open_page, part)


def test_a_recording_offers_no_test(open_page):
    page = open_page(saved_html(*encoder_recording()), view="#view=effects")
    page.get_by_text("Cutting needs the model itself").wait_for()
    assert page.get_by_role("region", name="trust").count() == 0


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 400)])
def test_axe_finds_nothing_serious_and_nothing_sticks_out(opened, theme, width):
    from test_page_access import WEB, serious

    source = WEB / "node_modules" / "axe-core" / "axe.min.js"
    if not source.exists():
        pytest.skip("needs tool: axe-core (npm ci in web/)")
    page = opened("&w=0.7", theme=theme, width=width)
    region = page.get_by_role("region", name="trust")
    region.get_by_role("button", name="put six attributions to the test").click()
    row = region.get_by_role("button", name="raw weight: scores")
    row.click()
    assert serious(page, source.read_text(encoding="utf-8")) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
