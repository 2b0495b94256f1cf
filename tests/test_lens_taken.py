"""What is taken away: figures, tables, sessions that draw the same bytes again, and the page in a notebook."""

import io
import json

import numpy as np
import pytest

from regard.lens import export
from regard.lens.links import word_weights
from regard.lens.look import look
from regard.lens.models import load
from regard.lens.payload import first_selection, payload
from test_lens_maps import dense, recording
from tiny_folders import SENTENCE, make

pytest_plugins = ["page_browser"]


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    return look(load(str(make(tmp_path_factory.mktemp("tiny") / "bert", "bert"))), SENTENCE)


@pytest.fixture(scope="module")
def page(view):
    return payload(view, first_selection(view, None, None, None))


def test_a_session_opens_to_the_same_view_and_draws_the_same_bytes(view, page, tmp_path):
    for ending in ("svg", "png", "session", "html"):
        export.write(tmp_path / f"first.{ending}", view, page)
    for source in ("first.session", "first.html"):
        held = export.read_session(tmp_path / source)
        assert held["selection"] == page["selection"]
        for ending in ("svg", "png"):
            export.write_session(tmp_path / f"again.{ending}", held)
            assert (tmp_path / f"again.{ending}").read_bytes() == (tmp_path / f"first.{ending}").read_bytes()
        export.write_session(tmp_path / "again.session", held)
        assert (tmp_path / "again.session").read_bytes() == (tmp_path / "first.session").read_bytes()
        export.write_session(tmp_path / "again.html", held)
        assert (tmp_path / "again.html").read_bytes() == (tmp_path / "first.html").read_bytes()


def test_a_session_keeps_the_view_that_it_was_saved_at(view, page, tmp_path):
    export.write(tmp_path / "one.session", view, page)
    held = export.read_session(tmp_path / "one.session")
    first = export.draw_session(held)
    moved = export.draw_session({**held, "view": "#l=1&h=2&w=0.3&over=layer-mean"})
    assert first != moved
    assert "mean of the layer" in moved


@pytest.mark.parametrize("content", ["", "{}", '{"format": "regard-page/9", "blobs": {}}', "[" * 9, "<html></html>"])
@pytest.mark.parametrize("ending", ["session", "html"])
def test_a_file_that_is_no_session_is_refused(tmp_path, content, ending):
    (tmp_path / f"x.{ending}").write_text(content)
    with pytest.raises(ValueError, match=r"look: session must be a file that regard saved; got .*x\.\w+, which is not"):
        export.read_session(tmp_path / f"x.{ending}")


def test_numbers_of_a_session_need_the_recording(view, page, tmp_path):
    export.write(tmp_path / "one.session", view, page)
    held = export.read_session(tmp_path / "one.session")
    with pytest.raises(ValueError, match=r"--save of a session must end in .html, .svg, .png or .session; got x.json."):
        export.write_session(tmp_path / "x.json", held)


def test_a_table_holds_every_pair_of_every_head(view, page, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs tool: pyarrow")
    export.write(tmp_path / "all.parquet", view, page)
    table = parquet.read_table(tmp_path / "all.parquet")
    assert table.schema.metadata[b"text"].decode() == SENTENCE
    held = table.to_pydict()
    attention, words = view.attentions[0], view.sides[0].words
    assert len(held["weight"]) == len(attention.layers) * attention.num_heads * len(words) ** 2
    at = {(1, 2, 8, 2): None}
    for row in range(len(held["weight"])):
        key = tuple(held[name][row] for name in ("layer", "head", "query", "key"))
        if key in at:
            assert (held["query_text"][row], held["key_text"][row]) == (words[8].text, words[2].text)
            assert held["weight"][row] == float(word_weights(view, 0, 1, 2)[8, 2])
            at.pop(key)
    assert not at
    monkeypatch.setattr(export, "MOST_PAIRS", 100)
    with pytest.raises(
        ValueError, match=r"--save to .parquet must have at most 100 pairs of words over all heads; got"
    ):
        export.write(tmp_path / "more.parquet", view, page)


def test_a_long_text_is_saved_with_its_map_and_without_its_matrix(tmp_path, native, monkeypatch):
    from regard import masks
    from regard.lens.opened import look_at

    monkeypatch.setattr("regard.lens.look.LARGEST_MAP", 1000)
    long = look_at(recording(900, mask=masks.causal()))
    told = payload(long, first_selection(long, 1, 2, None))
    told["selection"]["word"] = 700
    for ending in ("svg", "json", "session", "html"):
        export.write(tmp_path / f"long.{ending}", long, told)
    held = json.loads((tmp_path / "long.json").read_text())["heads"][0]
    assert held["weights"] is None
    expected = dense(long, 1, 2)[700]
    np.testing.assert_allclose([one["weight"] for one in held["links"][0]["links"][:50]], np.sort(expected)[::-1][:50],
                               rtol=1e-4)  # fmt: skip
    session = export.read_session(tmp_path / "long.session")
    assert export.draw_session(session) == (tmp_path / "long.svg").read_text()
    drawn = export.draw_session({**session, "view": "#l=1&h=2&view=map"})
    assert "One cell stands for 4 × 4 weights" in drawn
    assert (tmp_path / "long.html").stat().st_size < 2_000_000


def test_a_figure_shows_the_exact_weights(view):
    pytest.importorskip("matplotlib", reason="needs tool: matplotlib")
    tokens = [token.text for token in view.sides[0].tokens]
    axes = view.recording.plot(1, 2, rows=slice(2, 9), tokens=tokens)
    weights = view.recording.weights(1, 2, rows=slice(2, 9)).numpy()
    assert np.array_equal(np.asarray(axes.images[0].get_array()), weights)
    assert [label.get_text() for label in axes.get_yticklabels()] == tokens[2:9]
    assert axes.get_title() == "layer 1, head 2"
    mean = view.recording.plot(1, ax=axes.figure.add_subplot())
    np.testing.assert_allclose(mean.images[0].get_array(), view.recording.weights(1).mean(0), rtol=1e-6)
    out = io.BytesIO()
    axes.figure.savefig(out, format="svg")
    assert out.getvalue().startswith(b"<?xml")


def test_a_figure_of_too_much_is_refused(native, monkeypatch):
    monkeypatch.setattr("regard.lens.plot.MOST", 10_000)
    with pytest.raises(ValueError, match=r"plot: rows and cols must hold at most 10000 weights; got 300 x 300. Choose"):
        recording(300).plot(0, 0)


NOTEBOOK = """
from regard.lens.look import look
from regard.lens.models import load
from regard.lens.widget import Page

page = Page(look(load({folder!r}), {text!r}), layer=1, head=2)
page
"""


@pytest.mark.browser
def test_the_page_works_in_a_notebook(open_page, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs tool: nbformat")
    nbclient = pytest.importorskip("nbclient", reason="needs tool: nbclient")
    pytest.importorskip("anywidget", reason="needs tool: anywidget")
    pytest.importorskip("ipykernel", reason="needs tool: ipykernel")
    source = NOTEBOOK.format(folder=str(make(tmp_path / "bert", "bert")), text=SENTENCE)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [out for out in notebook.cells[0].outputs if out.output_type == "execute_result"]
    model = shown[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"][model]["state"]
    assert "srcdoc" in state["_esm"]
    page = open_page(state["html"])
    page.get_by_role("button", name="tired", exact=True).click()
    page.locator("path[data-from]").first.wait_for(state="attached")
    assert page.locator('button.head[aria-pressed="true"]').get_attribute("aria-label") == "layer 1 head 2"
    assert "= 100 %" in page.get_by_role("region", name="inspector").inner_text()
