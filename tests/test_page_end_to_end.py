"""The main job: a real model's attention, saved by the command line, asked on the page without a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from page_fixture import SENTENCE

pytest_plugins = ["page_browser"]
pytestmark = [pytest.mark.browser, pytest.mark.models]

CHECKOUT = Path(__file__).resolve().parents[1]
COMMAND = "from regard.cli import main; main()"


def look(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / "src"), "OMP_NUM_THREADS": "2"}
    environment.setdefault("REGARD_CACHE", str(CHECKOUT / ".cache"))
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "look", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from regard.lens import embedded
    from regard.lens.embedded.package import PackageUnavailable

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGARD_CACHE", os.environ.get("REGARD_CACHE") or str(CHECKOUT / ".cache"))
        try:
            embedded.folder("minilm")
        except PackageUnavailable as error:
            pytest.skip(f"needs tool: package of the minilm model ({error})")
    file = tmp_path_factory.mktemp("saved") / "out.html"
    done = look(SENTENCE, "--find", "it", "cat", "--save", str(file))
    assert done.returncode == 0, done.stderr
    return file.read_text(encoding="utf-8")


def thickest(page):
    lines = page.locator("path[data-from][data-to][data-weight]")
    lines.first.wait_for(state="attached")
    found = lines.evaluate_all(
        """paths => paths.map(p => ({from: +p.dataset.from, to: +p.dataset.to, weight: +p.dataset.weight,
            width: parseFloat(getComputedStyle(p).strokeWidth)}))"""
    )
    return max(found, key=lambda line: line["width"])


def names(page):
    return page.locator("button.word").evaluate_all("buttons => buttons.map(b => b.getAttribute('aria-label'))")


def test_clicking_it_draws_the_thickest_line_to_cat_at_the_head_that_was_found(saved, open_page):
    page = open_page(saved)
    page.get_by_role("button", name="it", exact=True).click()
    line = thickest(page)
    words = names(page)
    assert (words[line["from"]], words[line["to"]]) == ("it", "cat")
    assert line["weight"] == pytest.approx(0.68, abs=0.006)
    chosen = page.locator('button.head[aria-pressed="true"]')
    assert chosen.get_attribute("aria-label") == "layer 5 head 11"


def test_the_keyboard_alone_does_the_same(saved, open_page):
    page = open_page(saved)
    page.locator("button.word").first.wait_for()
    page.keyboard.press("Home")
    for _ in range(20):
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "it":
            break
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    line = thickest(page)
    words = names(page)
    assert (words[line["from"]], words[line["to"]]) == ("it", "cat")
    assert page.locator('button.word[aria-pressed="true"]').get_attribute("aria-label") == "it"
    text = page.get_by_role("region", name="inspector").inner_text()
    assert re.search(r"cat\s+68 %", text) and "= 100 %" in text


def test_how_the_number_came_about_ends_at_the_recorded_weight(saved, open_page):
    page = open_page(saved)
    page.get_by_role("button", name="it", exact=True).click()
    page.get_by_role("button", name="how 68 % came about").click()
    inspector = page.get_by_role("region", name="inspector")
    inspector.get_by_text("softmax →").first.wait_for()  # q and k are unpacked first
    text = inspector.inner_text()
    assert re.search(r"softmax → 0\.6\d{3}", text)
    assert "The recording says" not in text


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_command_line_saves_pictures_of_the_same_view(tmp_path, ending, saved):
    file = tmp_path / f"out.{ending}"
    done = look(SENTENCE, "--find", "it", "cat", "--save", str(file))
    assert done.returncode == 0, done.stderr
    if ending == "png":
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        return
    svg = file.read_text(encoding="utf-8")
    lines = re.findall(r'stroke-width="([\d.]+)"[^>]*data-from="(\d+)" data-to="(\d+)"', svg)
    width, _, to = max(lines, key=lambda line: float(line[0]))
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert int(to) == 2 and float(width) == pytest.approx(14 * 0.68, abs=0.1)
    assert "68 %" in texts and "= 100 %" in texts
