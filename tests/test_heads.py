"""`regard heads`: scores equal those of eager attention, a run that was killed goes on with the same bits, broken lines
are named."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from regard import cli
from regard.lens import embedded, gates, heads
from regard.lens import probes as probing
from regard.lens.cuts import Head
from regard.lens.embedded.package import PackageUnavailable
from regard.lens.head_scores import Tally, buckets
from regard.lens.models import load
from regard.lens.numbering import Numbering
from regard.lens.recorder import routed
from tiny_folders import make

CHECKOUT = Path(__file__).resolve().parents[1]
LINES = ["The cat sat on the mat because it was tired", "A dog and a cat", "", "it was the mat"]


@pytest.fixture(scope="module", params=["llama", "bert"])
def loaded(request, tmp_path_factory):
    return load(str(make(tmp_path_factory.mktemp("tiny") / request.param, request.param)))


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path / "corpus.txt"


def eager(loaded, ids):
    model = loaded.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [w[0].double() for w in found]


def tokens_of(loaded, text):
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if loaded.shape == "encoder":
        ids = [loaded.tokenizer.cls_token_id, *ids, loaded.tokenizer.sep_token_id]
    return ids


def test_scores_are_means_over_the_queries_of_all_texts(loaded, corpus, tmp_path):
    settings = heads.Settings(window=20, removal=1)
    told = heads.score_heads(loaded, corpus, tmp_path / "out", probing.built_in()[:0], settings)
    texts = [tokens_of(loaded, line) for line in LINES if line]
    maps = [eager(loaded, ids) for ids in texts]
    causal = loaded.shape == "decoder"
    for row in told["heads"]:
        own = [text[row["layer"]][row["head"]] for text in maps]
        rows = sum(len(w) for w in own)
        expected = {
            "previous": sum(w.diagonal(-1).sum() for w in own) / (rows - len(own)),
            "next": sum(w.diagonal(1).sum() for w in own) / (rows - len(own)),
            "same": sum(w.diagonal().sum() for w in own) / rows,
            "first": sum(w[1:, 0].sum() for w in own) / (rows - len(own)),
            "entropy": -sum(torch.special.xlogy(w, w).sum() for w in own) / rows,
        }
        away = [torch.arange(len(w))[None] - torch.arange(len(w))[:, None] for w in own]
        expected["distance"] = sum((w * a.abs()).sum() for w, a in zip(own, away, strict=True)) / rows
        squares, sums, counts = 0.0, torch.zeros(200), torch.zeros(200)
        for w, a in zip(own, away, strict=True):
            seen = (a <= 0) if causal else torch.ones_like(a, dtype=torch.bool)
            x = torch.where(seen, w - 1 / seen.sum(1, keepdim=True), 0)
            squares += float(x.square().sum())
            index = buckets(a)
            sums = sums.double().index_add(0, index[seen], x[seen])
            counts = counts.double().index_add(0, index[seen], torch.ones(int(seen.sum()), dtype=torch.float64))
        expected["positional"] = (sums.square() / counts.clamp(min=1)).sum() / squares
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), abs=2e-5), name
        assert row["content"] == pytest.approx(1 - row["positional"])
        assert 0 <= row["sink"] <= 1 + 1e-6
    assert told["windows"] == 3
    assert told["tokens"] == sum(map(len, texts))
    assert json.loads((tmp_path / "out" / "heads.json").read_text()) == json.loads(json.dumps(told))
    assert not (tmp_path / "out" / "state.json").exists()


def test_the_distance_buckets_are_exact_to_eight_and_coarser_beyond():
    away = torch.arange(40)[None] - torch.arange(40)[:, None]
    found = buckets(away)
    assert (found[:, 0] == 0).all()
    for near in range(-8, 9):
        assert len(found[:, 1:][away[:, 1:] == near].unique()) == 1
    assert len(found[:, 1:][(away[:, 1:].abs() <= 8)].unique()) == 17
    assert found.max() < 50 and len(found.unique()) < 35


def test_the_gradient_by_a_gate_is_that_of_finite_differences(loaded):
    loaded.model.double()
    try:
        loss, numbering = gates.Loss(loaded.model, loaded.tokenizer), Numbering(loaded.model)
        ids = tokens_of(loaded, LINES[0])
        with routed(loaded.model):
            found = gates.gradients(loss, numbering, ids, seed=3)
            step, place = 1e-6 if loaded.shape == "encoder" else 1e-3, list(found)[1]  # Llama's norms: float32

            def value(size):
                held = {}

                def change(call):
                    at = numbering.place(call)
                    held[at] = 1
                    out = call.out.clone()
                    if at == place:
                        out[:, 2] *= size
                    return out

                numbering.next_pass()
                with torch.no_grad(), regard_intervene(change, loaded.model):
                    given, labels = loss.prepared(ids, 3)
                    if loss.task != "embedding":
                        return float(loss(given, labels)[0])
                    embedding = loss.embedding(given)
                    direction = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(3)).double()
                    return float(embedding[0] @ direction / direction.norm())

            slope = abs(value(1 + step) - value(1 - step)) / (2 * step)
        assert float(found[place][2]) == pytest.approx(slope, rel=1e-4 if step == 1e-6 else 0.05, abs=1e-8)
    finally:
        loaded.model.float()


def regard_intervene(change, model):
    import regard.huggingface

    return regard.huggingface.intervene(change, model)


def test_a_removed_head_raises_the_loss_by_what_a_zeroed_projection_does(loaded):
    loss, numbering = gates.Loss(loaded.model, loaded.tokenizer), Numbering(loaded.model)
    ids = tokens_of(loaded, LINES[0])
    kind = "decoder" if loaded.shape == "decoder" else "encoder"
    with routed(loaded.model):
        whole, (lost,) = gates.removed(loss, numbering, ids, [[Head(1, 2, kind)]])
    names = [
        name
        for name, _ in loaded.model.named_parameters()
        if re.search(r"1\.(self_attn\.o_proj|attention\.output\.dense)\.weight", name)
    ]
    weight = loaded.model.get_parameter(names[0])
    kept = weight.detach().clone()
    given, labels = loss.prepared(ids, 0)
    with torch.no_grad():
        before = loss.embedding(given)[0] if loss.task == "embedding" else None
        assert whole == pytest.approx(float(loss(given, labels, before)[0]), abs=1e-5)
        weight[:, 16:24] = 0
        assert lost == pytest.approx(float(loss(given, labels, before)[0]), abs=1e-5)
        weight.copy_(kept)
    assert abs(lost - whole) > 1e-4


def test_a_tally_comes_back_from_disk_with_the_same_bits():
    tally = Tally(3)
    tally.add("previous", torch.rand(3), 7)
    tally.squares += torch.rand(3)
    tally.bucket_sums += torch.rand(3, tally.bucket_sums.shape[1])
    again = Tally.from_json(json.loads(json.dumps(tally.to_json())))
    assert torch.equal(again.sums["previous"], tally.sums["previous"])
    assert torch.equal(again.bucket_sums, tally.bucket_sums)
    assert again.to_json() == tally.to_json()


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(loaded, corpus, tmp_path, monkeypatch):
    settings = heads.Settings(window=8, removal=1)
    whole = heads.score_heads(loaded, corpus, tmp_path / "whole", settings=settings)
    monkeypatch.setattr(heads, "SAVE_EVERY", -1)
    reached = []

    def stop(message, _share):
        reached.append(message)
        if len(reached) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heads.score_heads(loaded, corpus, tmp_path / "stopped", settings=settings, progress=stop)
    held = json.loads((tmp_path / "stopped" / "state.json").read_text())
    assert held["windows"] == 2
    assert heads.score_heads(loaded, corpus, tmp_path / "stopped", settings=settings) == whole


def test_a_directory_that_holds_another_run_is_refused(loaded, corpus, tmp_path):
    (tmp_path / "state.json").write_text('{"identity": {"model": "another"}}')
    with pytest.raises(ValueError, match="heads: --out must be empty or hold this run; got .*, which holds another."):
        heads.score_heads(loaded, corpus, tmp_path, settings=heads.Settings(window=16))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="heads: --out must be empty or hold this run"):
        heads.score_heads(loaded, corpus, tmp_path, settings=heads.Settings(window=16))


def run(*arguments):
    return CliRunner().invoke(cli.app, ["heads", *map(str, arguments)], env={"COLUMNS": "120"})


def test_the_command_writes_a_table_and_a_report(loaded, corpus, tmp_path, request):
    folder = make(tmp_path / "model", request.node.callspec.params["loaded"])
    corpus.write_bytes(b"the cat sat\nthe \xff mat\nit was\x00 tired\n" + b"A dog and a cat\n")
    refused = run(folder, corpus, "--out", tmp_path / "out", "--window", 16)
    assert refused.exit_code == 1
    assert "every line of CORPUS must be UTF-8 text; got line 2, not UTF-8." in refused.output.replace("\n", " ")
    done = run(folder, corpus, "--out", tmp_path / "out", "--window", 16, "--skip-broken", "--removal", 0)
    assert done.exit_code == 0, done.output
    assert "skipped line 2: not UTF-8" in done.output
    assert "skipped line 3: with control characters" in done.output
    told = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert told["windows"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["heads"] == told["heads"]
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_parquet_holds_the_same_numbers(loaded, corpus, tmp_path):
    pytest.importorskip("pyarrow", reason="needs tool: pyarrow")
    from pyarrow import parquet

    from regard.lens import heads_files

    told = heads.score_heads(loaded, corpus, tmp_path, settings=heads.Settings(window=16, removal=0))
    heads_files.write(told, tmp_path, parquet=True)
    rows = parquet.read_table(tmp_path / "heads.parquet").to_pylist()
    assert rows == [{name: own for name, own in row.items() if name != "examples"} for row in told["heads"]]


def test_parquet_without_pyarrow_is_refused_before_the_work(monkeypatch):
    from regard.lens import heads_files

    monkeypatch.setattr(heads_files, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="heads: --parquet must have pyarrow; got none."):
        heads_files.check(True)
    heads_files.check(False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "3"], "heads: --window must be from 4 to "),
        (["--window", "600"], "heads: --window must be from 4 to "),
        (["--window", "16", "--windows", "0"], "heads: --windows must be at least 1; got 0."),
        (["--window", "16", "--removal", "-1"], "heads: --removal must be at least 0; got -1."),
        (
            ["--window", "16", "--probes", "nowhere.tsv"],
            "heads: --probes must be a text file that can be read; got nowhere.tsv",
        ),
    ],
)
def test_settings_out_of_range_are_refused(corpus, tmp_path, arguments, message):
    done = run(make(tmp_path / "model", "bert"), corpus, "--out", tmp_path / "out", *arguments)
    assert done.exit_code == 1
    assert message in done.output.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_other_models_and_files_are_refused(tmp_path, corpus, loaded):
    with pytest.raises(ValueError, match="heads: CORPUS must be a text file; got nowhere.txt."):
        heads.score_heads(loaded, "nowhere.txt", tmp_path / "a", settings=heads.Settings(window=16))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="heads: CORPUS must hold a text of two tokens; got none in empty.txt."):
        heads.score_heads(loaded, tmp_path / "empty.txt", tmp_path / "a", settings=heads.Settings(window=16))
    t5 = load(str(make(tmp_path / "t5", "t5")))
    with pytest.raises(ValueError, match="heads: model must read one text and predict its words, or embed it"):
        heads.score_heads(t5, corpus, tmp_path / "b", settings=heads.Settings(window=16))


def test_the_built_in_probes_point_at_their_words():
    for probe in [*probing.built_in(), *(one for pair in probing.twins() for one in pair)]:
        assert probe.text[slice(*probe.pronoun)] == "it"
        assert probe.text[slice(*probe.right)].isalpha()
        assert probe.right != probe.other
    for one, two in probing.twins():
        assert one.text[slice(*one.right)] == two.text[slice(*two.other)]


def test_probe_files_are_read_and_their_broken_rows_are_named(tmp_path):
    gap = tmp_path / "gap.tsv"
    head = "ID\tText\tPronoun\tPronoun-offset\tA\tA-offset\tA-coref\tB\tB-offset\tB-coref\tURL\n"
    good = "1\tAda met Bob; she left.\tshe\t13\tAda\t0\tTRUE\tBob\t8\tFALSE\tu\n"
    gap.write_text(head + good + good.replace("\t13\t", "\t14\t"))
    with pytest.raises(ValueError, match="got line 3 of gap.tsv: an offset does not stand at its word."):
        probing.read(gap)
    found, broken = probing.read(gap, skip_broken=True)
    assert [found[0].text[slice(*span)] for span in (found[0].pronoun, found[0].right, found[0].other)] == [
        "she",
        "Ada",
        "Bob",
    ]
    assert broken == ["gap.tsv, line 3: an offset does not stand at its word"]
    blocks = tmp_path / "probes.txt"
    blocks.write_text("The cook met the clerk and [MASK] left.\n[MASK]\nThe cook,the clerk\nthe clerk\n\nAda ran.\n")
    found, broken = probing.read(blocks, "she", skip_broken=True)
    assert found[0].text == "The cook met the clerk and she left."
    assert found[0].text[slice(*found[0].right)] == "the clerk"
    assert found[0].text[slice(*found[0].other)] == "The cook"
    assert len(broken) == 1 and broken[0].startswith("probes.txt, line 6: a block must be")
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(ValueError, match="heads: --probes must hold a probe; got none in none.txt."):
        probing.read(tmp_path / "none.txt")


@pytest.mark.models
def test_minilm_links_it_to_its_noun(tmp_path):
    try:
        model = load("minilm")
    except PackageUnavailable as error:
        pytest.skip(f"needs tool: package {embedded.FAMILIES['minilm'].package.requirement} ({error})")
    (tmp_path / "corpus.txt").write_text("The rain had stopped before the train left the station.\n")
    told = heads.score_heads(
        model, tmp_path / "corpus.txt", tmp_path / "out", probing.built_in(), heads.Settings(removal=0)
    )
    best = max(told["heads"], key=lambda row: row["coreference"])
    assert (best["layer"], best["head"]) == (3, 1)
    assert best["coreference_right"] == pytest.approx(0.8)
    assert best["coreference"] == pytest.approx(0.41 - 0.18, abs=0.02)
    previous = max(told["heads"], key=lambda row: row["previous"])
    assert (previous["layer"], previous["head"]) == (0, 2)
