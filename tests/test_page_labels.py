"""`regard look --heads`: scores over a corpus sort the heads of the page and label them; other files are refused."""

import json

import pytest
from typer.testing import CliRunner

from regard import cli
from regard.lens import heads
from regard.lens.models import load
from tiny_folders import SENTENCE, TEXTS, make

pytest_plugins = ["page_browser"]


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A tiny model's folder and its heads.json."""
    root = tmp_path_factory.mktemp("labels")
    folder = make(root / "llama", "llama")
    (root / "corpus.txt").write_text("\n".join(TEXTS[:4]), encoding="utf-8")
    told = heads.score_heads(load(str(folder)), root / "corpus.txt", root / "out", (), heads.Settings(removal=1))
    return str(folder), root / "out" / "heads.json", told


def look(folder, *arguments):
    return CliRunner().invoke(cli.app, ["look", SENTENCE, "--model", folder, *map(str, arguments)])


@pytest.mark.browser
def test_heads_are_sorted_and_labelled_by_what_they_do_over_a_corpus(held, open_page, tmp_path):
    folder, file, told = held
    page_file = tmp_path / "page.html"
    run = look(folder, "--heads", file, "--save", page_file)
    assert run.exit_code == 0, run.output
    rows = {(row["layer"], row["head"]): row for row in told["heads"]}
    page = open_page(page_file.read_text(encoding="utf-8"), view="#l=0&h=0&view=heads")
    for name, key in (("induction", "induction"), ("previous, over the corpus", "previous")):
        page.get_by_label("sort by").select_option(name)
        page.get_by_role("group", name="heads, largest first").wait_for(state="attached")
        order = page.locator(".bighead button.head").evaluate_all(
            "b => b.map(x => [+x.dataset.layer, +x.dataset.head])"
        )
        scores = [rows[tuple(at)][key] for at in order]
        assert len(order) == len(rows) and scores == sorted(scores, reverse=True)
    roles = ("previous", "next", "same", "first", "separator", "sink", "induction", "duplicate")
    labelled = 0
    for at, row in rows.items():
        name, score = max(((role, row[role]) for role in roles if role in row), key=lambda one: one[1])
        page.goto(page.url.split("#")[0] + f"#l={at[0]}&h={at[1]}")
        page.locator(f'button.head[aria-pressed="true"][aria-label="layer {at[0]} head {at[1]}"]').first.wait_for()
        expected = f"layer {at[0]} head {at[1]}: {name} {score:.2f} over a corpus" if score >= 0.4 else None
        labelled += expected is not None
        assert page.locator("aside.heads .label").all_inner_texts() == ([expected] if expected else [])
    assert labelled


def changed(told, **changes):
    return json.dumps({**told, **changes})


@pytest.mark.parametrize("case", ["none", "no json", "another format", "another model", "another shape", "name"])
def test_a_file_that_does_not_fit_is_refused(held, tmp_path, case):
    folder, _, told = held
    file = tmp_path / "heads.json"
    text, message = {
        "none": (None, "--heads must be a file that is there"),
        "no json": ("{", "--heads must be a heads.json of regard heads; got heads.json. Run regard heads"),
        "another format": (changed(told, format="x"), "--heads must be a heads.json of regard heads"),
        "another model": (changed(told, model="bert"), "--heads must be of the model that is shown, llama; got scores"),
        "another shape": (changed(told, heads=told["heads"][1:]), "--heads must hold each of the 2 × 4 heads"),
        "name": (changed(told, scores=["x" * 41]), "--heads must name its scores in words"),
    }[case]
    if text is not None:
        file.write_text(text, encoding="utf-8")
    run = look(folder, "--heads", file, "--save", tmp_path / "page.html")
    assert run.exit_code == 1
    assert message in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "page.html").exists()
