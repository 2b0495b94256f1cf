"""The end of how a number came about: the key's value, weight times it, and the row that the head gives."""

import re

import pytest
import torch

from page_fixture import SENTENCE
from regard.lens import export, values
from regard.lens.look import look
from regard.lens.models import load
from regard.lens.payload import blob, first_selection, payload, saved
from tiny_folders import make

pytest_plugins = ["page_browser"]


@pytest.fixture(scope="module", params=["bert", "llama", "t5"])
def seen(request, tmp_path_factory):
    return look(load(str(make(tmp_path_factory.mktemp("values") / request.param, request.param))), SENTENCE)


def test_weights_times_values_are_the_output_of_every_head(seen):
    for index, attention in enumerate(seen.attentions):
        for layer in attention.layers:
            weights = seen.recording.weights(layer, step=0).double()
            for head in range(layer.num_heads):
                for row in (0, weights.shape[1] - 1):
                    found = blob(seen, f"values/{index}/{layer.number}/{head}/{row}")
                    assert found.shape == [weights.shape[2] + 1, found.shape[1]]
                    rows = found.numbers.double()
                    torch.testing.assert_close(weights[head, row] @ rows[:-1], rows[-1], atol=2e-6, rtol=1e-5)
    assert blob(seen, f"values/0/0/{seen.attentions[0].num_heads}/0") is None
    assert blob(seen, "values/0/0/0/1000") is None
    assert blob(seen, "values/0/0") is None


def test_values_stay_within_their_bound(seen, monkeypatch):
    held = list(seen.values.held.values())
    first = sum(one.numel() * one.element_size() for one in held[0])
    monkeypatch.setattr(values, "LARGEST_VALUES", first)
    again = look(seen.loaded, SENTENCE)
    assert again.values.spent <= first and len(again.values.held) == 1
    page = payload(again, first_selection(again, None, None, None))
    assert sum(len(one["values"]) for one in page["attentions"]) == 1


@pytest.mark.browser
def test_the_value_and_the_output_row_are_on_a_saved_page(seen, open_page):
    selection = first_selection(seen, None, None, None)
    html = export.page_html(saved(payload(seen, selection), seen))
    attention = seen.attentions[selection.attention]
    words = seen.sides[attention.query_side].words
    place = f"a={selection.attention}&l={selection.layer}&h={selection.head}"
    page = open_page(html, view=f"#{place}&w={attention.query_side}.{selection.word}&t={selection.target}&how=1")
    inspector = page.get_by_role("region", name="inspector")
    inspector.get_by_text("sum of weight × value").wait_for()
    text = inspector.inner_text().replace("\n", " ").replace("−", "-")
    lengths = []
    for token in range(*words[selection.word].tokens):
        row = seen.values.row(attention.kind, selection.layer, selection.head, token)
        lengths.append(float(row[-1].norm()))
    shown = float(re.search(r"sum of weight × value → ([\d.e+-]+) long", text)[1])
    assert min(abs(shown / length - 1) for length in lengths) < 1e-3
    assert float(re.search(r"is the same to within ([\d.e+-]+?)\.(?: |$)", text)[1]) < 1e-4
    labels = inspector.locator(".t").all_inner_texts()
    assert {"v", "w·v", "out"} <= set(labels)
    high = inspector.locator(".picture").evaluate(
        """picture => ["v", "w·v"].map(label => {
            const svg = [...picture.children].find(one => one.textContent === label).nextElementSibling;
            const drawn = svg.querySelectorAll("path")[1].getAttribute("d");
            return Math.max(...[...drawn.matchAll(/v([\\d.]+)h/g)].map(m => +m[1]));
        })"""
    )
    weight = float(re.search(r"× value: ([\d.e+-]+) ×", text)[1])
    assert high[1] / high[0] == pytest.approx(weight, abs=0.03)  # drawn on one scale
    other = (selection.head + 1) % attention.num_heads
    page.goto(page.url.replace(f"h={selection.head}&", f"h={other}&"))
    page.locator(f'button.head[aria-pressed="true"][data-head="{other}"]').first.wait_for()
    inspector.get_by_text("× value").first.wait_for()
    assert inspector.get_by_text("sum of weight × value").count() == 0  # of this head the file holds no values
