"""`regard look` from end to end: what it prints, writes and refuses; the known heads of the real models."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import regard
from regard import cli
from regard.lens import embedded
from regard.lens.embedded.package import PackageUnavailable
from tiny_folders import SENTENCE, make

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, held = tmp_path_factory.mktemp("tiny"), {}

    def one(kind):
        if kind not in held:
            held[kind] = str(make(root / kind, kind))
        return held[kind]

    return one


def look(*arguments):
    return CliRunner().invoke(cli.app, ["look", *map(str, arguments)], env={"COLUMNS": "100"})


def test_find_lists_the_heads_and_opens_the_best(folders, tmp_path):
    page = tmp_path / "page.json"
    run = look(SENTENCE, "--model", folders("bert"), "--find", "it", "cat", "--save", page)
    assert run.exit_code == 0, run.output
    held = json.loads(page.read_text())
    best = held["found"][0]
    assert best["weight"] == max(one["weight"] for one in held["found"])
    assert (held["heads"][0]["layer"], held["heads"][0]["head"]) == (best["layer"], best["head"])
    assert held["heads"][0]["links"][0]["word"] == "it"
    assert "heads that link it to cat" in run.output
    assert re.search(rf"it +cat +{best['weight']:.2f} +█* +{best['layer']} +{best['head']} +\d+ of 10", run.output)
    assert "set apart: " in run.output
    assert f"Wrote {page}" in run.output


def test_a_single_word_is_linked_to_nothing(folders, tmp_path):
    run = look("cat", "--model", folders("bert"), "--save", tmp_path / "page.svg")
    assert run.exit_code == 0, run.output
    assert "no word is linked to another here" in run.output
    assert "[CLS] marker, " in run.output


def test_a_phrase_is_found_by_its_words(folders, tmp_path):
    run = look("--model", folders("bert"), "--find", "the mat", "Cat", "--save", tmp_path / "page.json")
    assert run.exit_code == 0, run.output
    assert re.search(r"the mat +cat +0\.\d\d", run.output)


def test_layer_and_head_are_opened_as_asked(folders, tmp_path):
    page = tmp_path / "page.json"
    run = look(SENTENCE, "--model", folders("llama"), "--layer", 1, "--head", 3, "--save", page)
    assert run.exit_code == 0, run.output
    assert "strongest links, layer 1, head 3" in run.output
    one = json.loads(page.read_text())["heads"][0]
    assert (one["layer"], one["head"]) == (1, 3)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_every_kind_of_model_gets_a_page(folders, tmp_path, kind):
    target = ["--target", "it was a cat"] if kind == "t5" else []
    run = look("--model", folders(kind), *target, "--save", tmp_path / "page.html")
    assert run.exit_code == 0, run.output
    assert ("cross-attention" in run.output) == (kind == "t5")
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_a_speech_model_hears_a_wav_file(folders, tmp_path):
    import wave

    with wave.open(str(tmp_path / "hum.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "none"))
        file.writeframes(bytes(range(256)) * 100)
    run = look(
        tmp_path / "hum.wav", "--model", folders("whisper"), "--target", "a cat", "--save", tmp_path / "page.html"
    )
    assert run.exit_code == 0, run.output
    assert "cross-attention" in run.output
    assert "silence" in run.output


def refusals(folders, tmp_path):
    out = ["--save", tmp_path / "page.html"]
    bert, llama = ["--model", folders("bert")], ["--model", folders("llama")]
    return {
        "missing model": (["--model", tmp_path / "none", *out], "model must be a directory that exists"),
        "empty text": (["", *bert, *out], "text must have a word in it; got an empty one. Pass a sentence."),
        "long text": (["cat " * 40, *bert, *out], "text must be at most 24 tokens for bert; got 42. Make it shorter."),
        "missing word": ([*bert, "--find", "it", "dog", *out], 'words must be in the text; got "dog". Choose from'),
        "later word": ([*llama, "--find", "cat", "it", *out], "Turn them round."),
        "layer": ([*bert, "--layer", 9, *out], "--layer must be from 0 to 2 for bert; got 9. Choose one of those."),
        "head": ([*bert, "--head", 4, *out], "--head must be from 0 to 3 for bert; got 4. Choose one of those."),
        "ending": ([*bert, "--save", tmp_path / "page.doc"], "--save must end in .html, .svg, .png, .json, .parquet"),
        "folder": ([*bert, "--save", tmp_path / "no" / "page.html"], "--save must lie in a directory that exists"),
        "sound": (["--model", folders("whisper"), *out], "TEXT must be the path of a .wav file for whisper"),
        "port": ([*bert, "--port", 70000], "--port must be from 1 to 65535; got 70000. Choose another, or leave"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["missing model", "empty text", "long text", "missing word", "later word", "layer", "head", "ending", "folder",
     "sound", "port"],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_a_status(folders, tmp_path, case):
    arguments, message = refusals(folders, tmp_path)[case]
    run = look(*arguments)
    assert run.exit_code == 1
    said = run.stderr.strip()
    assert message in said
    assert said.startswith("error look: ")
    assert said.endswith(".")
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_refused_before_the_model_is_loaded(folders):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        run = look("--model", "./nowhere", "--port", other.getsockname()[1])
    assert run.exit_code == 1
    assert "which another program uses. Choose another, or leave it out." in run.stderr


def test_an_argument_that_is_no_number_is_a_usage_error(folders):
    assert look("--layer", "two").exit_code == 2


def test_the_version_is_said():
    run = CliRunner().invoke(cli.app, ["--version"])
    assert run.exit_code == 0
    assert run.output == f"regard {regard.__version__}\n"


def test_help_loads_neither_torch_nor_transformers():
    program = (
        "import sys\nfrom regard import cli\n"
        "sys.argv = ['regard', 'look', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as left:\n    assert not left.code\n"
        "print('loaded', sorted({'transformers', 'starlette', 'uvicorn', 'quickjs'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT / "src")}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "--find" in run.stdout
    assert run.stdout.endswith("loaded []\n")


def test_a_browser_is_opened_only_where_there_is_one(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not cli._has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert cli._has_browser()


def served(monkeypatch, *arguments):
    """What the server was given, and what the browser was, without serving."""
    given, opened = [], []

    def serve(listening, view, run, started, asks=None, *, turn=None):
        given.append((view, run, listening.getsockname()))
        started("http://127.0.0.1:8765/")

    monkeypatch.setattr("regard.lens.server.serve", serve)
    monkeypatch.setattr("webbrowser.open", opened.append)
    run = look(*arguments)
    assert run.exit_code == 0, run.output
    return given[0], opened, run


def test_the_page_is_served_and_runs_other_texts(monkeypatch, folders):
    monkeypatch.setenv("DISPLAY", ":0")
    (view, again, address), opened, run = served(
        monkeypatch, SENTENCE, "--model", folders("bert"), "--find", "it", "cat"
    )
    assert view.page["live"] is True
    assert view.page["found"][0]["layer"] == view.page["selection"]["layer"]
    assert address[0] == "127.0.0.1"
    assert opened == ["http://127.0.0.1:8765/"]
    assert "http://127.0.0.1:8765/" in run.output
    assert again("it was a cat").page["text"] == "it was a cat"
    with pytest.raises(ValueError, match="text must have a word in it"):
        again(" ")


def test_no_browser_is_opened_when_told_so(monkeypatch, folders):
    monkeypatch.setenv("DISPLAY", ":0")
    _, opened, _ = served(monkeypatch, SENTENCE, "--model", folders("bert"), "--no-browser")
    assert opened == []


# --- the real models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """Skips where an embedded model's package cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGARD_CACHE", os.environ.get("REGARD_CACHE") or str(CHECKOUT / ".cache"))

        def need(name):
            try:
                return embedded.folder(name)
            except PackageUnavailable as error:
                pytest.skip(f"needs tool: the package of {name} ({error})")

        yield need


KNOWN = {
    "minilm": [(5, 11, 0.68), (3, 1, 0.49), (5, 4, 0.42), (4, 3, 0.32), (4, 8, 0.25)],
    "smollm2": [(13, 8, 0.80), (3, 8, 0.49), (9, 2, 0.45), (16, 5, 0.43), (4, 1, 0.35)],
}


@pytest.mark.models
@pytest.mark.parametrize("name", KNOWN)
def test_known_heads_link_it_to_cat(real, tmp_path, name):
    real(name)
    page = tmp_path / "page.json"
    run = look(SENTENCE, "--model", name, "--find", "it", "cat", "--save", page)
    assert run.exit_code == 0, run.output
    found = json.loads(page.read_text())["found"][:5]
    assert [(one["layer"], one["head"], round(one["weight"], 2)) for one in found] == KNOWN[name]
    assert len(re.findall(r" 1 of (?:10|8)\b", run.output)) >= 5


@pytest.mark.models
@pytest.mark.parametrize("name", ["minilm", "smollm2", "rxnmapper", "mathformer"])
def test_recorded_weights_of_real_models_are_those_of_eager_attention(real, name):
    from regard.lens.look import default_text
    from regard.lens.look import look as record_look
    from regard.lens.models import load

    real(name)
    loaded = load(name)
    seen = record_look(loaded, default_text(loaded))
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        ids = seen.recording.token_ids["text"][0]
        eager = loaded.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    assert len(seen.attentions[0].layers) == len(eager)
    for number, expected in enumerate(eager):
        torch.testing.assert_close(seen.recording.weights(number), expected[0], atol=1e-4, rtol=1e-3)


@pytest.mark.models
def test_rxnmapper_links_product_atoms_to_their_reactant_atoms(real, tmp_path):
    real("rxnmapper")
    run = look("--model", "rxnmapper", "--layer", 10, "--head", 5, "--save", tmp_path / "page.json")
    assert run.exit_code == 0, run.output
    held = json.loads((tmp_path / "page.json").read_text())
    assert held["text"] == "CC(=O)OC(C)=O.OC(=O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O"
    weights, keys = torch.tensor(held["heads"][0]["weights"]), held["keys"]
    arrow = keys.index(">>")
    atoms = [at for at, text in enumerate(keys) if text in "CcO" and at < arrow]
    products = [at for at, text in enumerate(held["queries"]) if text in "CcO" and at > arrow]
    assert len(products) == 13
    pointed = [atoms[int(weights[at, atoms].argmax())] for at in products]
    assert sum(keys[at] == held["queries"][one] for one, at in zip(products, pointed, strict=True)) >= 12


def test_a_recording_is_opened_from_its_directory_and_a_session_from_its_file(monkeypatch, folders, tmp_path):
    import torch

    from regard.lens.layers import Keys, Layer, Step
    from regard.lens.recording import Recording

    q, keys = torch.zeros(1, 1, 3, 4), Keys(torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3))
    steps = [Step(at, q, torch.full((1, 1, 3), 3.0).log(), keys, ((0, 3),), 0.5, None, None, None, None, 0, 0)
             for at in range(2)]  # fmt: skip
    Recording([Layer("attention", 0, "encoder", steps)], {"id": "tiny"}).save(tmp_path / "held")
    turned = []

    def serve(listening, view, run, started, asks=None, *, turn=None):
        with pytest.raises(ValueError, match=r"text must be run by a model; got a recording, which holds none"):
            run("a cat")
        turned.extend([view.look.window, turn(1).look.window])

    monkeypatch.setattr("regard.lens.server.serve", serve)
    run = look(tmp_path / "held", "--no-browser")
    assert run.exit_code == 0, run.output
    assert turned == [(0, 2), (1, 2)]
    session, again = tmp_path / "one.session", tmp_path / "again.svg"
    assert look(tmp_path / "held", "--save", session).exit_code == 0
    assert look(session, "--save", again).exit_code == 0
    first = tmp_path / "first.svg"
    assert look(tmp_path / "held", "--save", first).exit_code == 0
    assert first.read_bytes() == again.read_bytes()
    pages = []
    monkeypatch.setattr("regard.lens.server.serve_page", lambda _listening, html, _started: pages.append(html))
    assert look(session, "--no-browser").exit_code == 0
    assert "regard-page/1" in pages[0]
