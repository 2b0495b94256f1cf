"""The recipes: runs go on exactly, what breaks is said and harms nothing, and each short form learns on its true data.

Enters: tiny models; the data beside the checkout, where it is there. Leaves: nothing but temporary folders.
Floor: above the tests.
"""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPES = CHECKOUT / "recipes"
sys.path.insert(0, str(RECIPES))

import checkpoints  # noqa: E402
import flags  # noqa: E402
import language_model  # noqa: E402
import training  # noqa: E402
import translate  # noqa: E402
from training import NotFinite, Plain, Settings, train  # noqa: E402

SHORT = Settings(12, every=4, warmup=3, keep=3, accumulate=2)


def data(name: str) -> Path:
    """Data of the recipes, which lies beside a checkout."""
    if not (flags.DATA / name).exists():
        pytest.skip(f"no data: {name} beside the checkout, or where REGARD_DATA says")
    return flags.DATA / name


def regression(batch: int = 7) -> tuple[nn.Module, Plain]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(50, 4)
    return model, Plain(x, x.sum(1, keepdim=True), batch=batch)


def squares(model, x, y):
    return (model(x) - y).square().mean()


def go(folder, settings=SHORT, resume=False, loss=squares, **named):
    model, batches = regression()
    return model, train(model, batches, loss, settings, folder=folder, resume=resume, **named)


# ---- going on ----


def test_a_run_stopped_by_its_minutes_goes_on_with_the_same_bits(tmp_path):
    whole, trained = go(tmp_path / "whole")
    _, first = go(tmp_path / "two", Settings(**{**vars(SHORT), "minutes": 0.0}))
    assert (first.step, first.finished) == (1, False)
    second, rest = go(tmp_path / "two", resume=True)
    assert rest.finished
    assert first.losses + rest.losses == trained.losses
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


KILLED = """
import os, signal, sys, torch
sys.path[:0] = sys.argv[1:3]
import checkpoints, translate
from pathlib import Path
from training import Settings, train
from regard.models import Seq2Seq
words = "one two three four five six seven".split()
pairs = [(" ".join(words[i % 7:][:4]), " ".join(reversed(words[i % 7:][:4])), "fr") for i in range(40)]
tokenizer = translate.make_tokenizer(pairs, 300, ["fr"])
torch.manual_seed(0)
shape = {"dim": 16, "num_heads": 2, "num_layers": 1, "hidden": 32, "dropout": 0.2}
model = Seq2Seq(tokenizer.get_vocab_size(), start_token=1, end_token=2, **shape)
left = [int(sys.argv[6])]
def count(inner):
    def counted(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args)
    return counted
loss = count(translate.smoothed) if sys.argv[5] == "step" else translate.smoothed
if sys.argv[5] == "file":
    checkpoints.save_file = count(checkpoints.save_file)
train(
    model, translate.Sentences(pairs, tokenizer, 6), loss, Settings(int(sys.argv[4]), every=5, warmup=4),
    folder=Path(sys.argv[3]), resume=True,
)
"""


def translator(folder, steps=60, dies="never", after=0):
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, RECIPES, CHECKOUT / "src", folder, str(steps), dies, str(after)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in checkpoints.read_log(folder) if "loss" in line}


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_run_killed_in_a_step_and_in_a_file_goes_on_with_the_same_losses(tmp_path, native):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = translator(whole)
    errors = process.communicate(timeout=250)[1]
    assert process.returncode == 0, errors
    for dies, after in (("step", 13), ("file", 5)):  # 5: in the second checkpoint after step 10, its optimiser
        process = translator(killed, dies=dies, after=after)
        errors = process.communicate(timeout=250)[1]
        assert process.returncode == -signal.SIGKILL, errors
    assert checkpoints.Checkpoints(killed, 1).last().name == "checkpoint-000015"
    process = translator(killed)
    errors = process.communicate(timeout=250)[1]
    assert process.returncode == 0, errors
    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 60
    one, other = (load_file(folder / "checkpoint-000060" / "weights.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_leaves_a_checkpoint_of_the_last_step(tmp_path, native):
    process = translator(tmp_path / "run", steps=100_000)
    wait_for((tmp_path / "run" / "checkpoint-000005").exists, process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=250)[1]
    assert process.returncode == 0, errors
    last = checkpoints.Checkpoints(tmp_path / "run", 1).last()
    state = checkpoints.read_state(last)
    assert state["place"]["step"] == max(losses(tmp_path / "run"))


def test_a_finished_run_takes_no_further_step(tmp_path):
    go(tmp_path)
    model, again = go(tmp_path, resume=True)
    assert (again.step, again.losses, again.finished) == (12, [], True)
    weights = load_file(tmp_path / "checkpoint-000012" / "weights.safetensors")
    assert torch.equal(model[0].weight, weights["0.weight"])


def test_the_best_evaluation_comes_back_after_a_stop_too(tmp_path):
    scores = {4: 1.0, 8: 3.0, 12: 2.0}

    def evaluate(step):
        return lambda model: {"score": scores[step()]}

    folder = tmp_path / "run"
    done = lambda: max(losses(folder))  # noqa: E731
    go(folder, Settings(**{**vars(SHORT), "minutes": 0.0}))
    model, trained = go(folder, resume=True, evaluate=evaluate(done))
    assert trained.best == {"score": 3.0, "step": 8}
    assert torch.equal(model[0].weight, load_file(folder / "best.safetensors")["0.weight"])
    last = load_file(folder / "checkpoint-000012" / "weights.safetensors")
    assert not torch.equal(model[0].weight, last["0.weight"])


def test_two_processes_take_the_step_of_one_with_twice_the_batches(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(RECIPES)!r}, {str(CHECKOUT / "src")!r}]
import torch
from pathlib import Path
from torch import nn
from training import Plain, Settings, train
torch.manual_seed(1)
model, x = nn.Linear(4, 1), torch.randn(48, 4)
train(model, Plain(x, x.sum(1, keepdim=True), batch=6), lambda m, x, y: (m(x) - y).square().mean(),
      Settings(6, every=3, warmup=2, accumulate=int(sys.argv[1])), folder=Path(sys.argv[2]))
"""
    (tmp_path / "run.py").write_text(code)
    for processes, accumulate in ((1, 2), (2, 1)):
        ran = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
             tmp_path / "run.py", str(accumulate), tmp_path / str(processes)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 6
    for step, loss in one.items():
        assert math.isclose(two[step], loss, rel_tol=1e-5)


# ---- what breaks ----


def test_a_loss_that_is_no_number_stops_and_says_where(tmp_path):
    calls = 0

    def bursts(model, x, y):
        nonlocal calls
        calls += 1
        if calls == 12:
            with torch.no_grad():
                model[2].weight[0, 3] = math.nan
        return squares(model, x, y)

    with pytest.raises(NotFinite, match=r"loss must be finite; got nan at step 6, epoch 1, .* parameter 2.weight") as e:
        go(tmp_path, loss=bursts)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-000004'}" in str(e.value)
    _, rest = go(tmp_path, resume=True)
    _, whole = go(None)
    assert rest.losses == whole.losses[4:]


def test_a_gradient_that_is_no_number_stops_too(tmp_path):
    with pytest.raises(NotFinite, match="gradient must be finite; .* the gradient of 0.weight"):
        go(tmp_path, loss=lambda model, x, y: squares(model, x, y) + (model[0].weight * 0).square().sum().sqrt())


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_cut_in_half_is_refused_and_the_one_before_goes_on(tmp_path, name):
    _, whole = go(tmp_path)
    broken = tmp_path / "checkpoint-000012"
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"must be whole; got {name}.* Remove it to go on from checkpoint-000008"):
        go(tmp_path, resume=True)
    shutil.rmtree(broken)
    _, rest = go(tmp_path, resume=True)
    assert rest.losses == whole.losses[8:]


def test_other_bytes_of_the_same_length_are_refused(tmp_path):
    go(tmp_path)
    path = tmp_path / "checkpoint-000012" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.safetensors with other bytes than were written"):
        go(tmp_path, resume=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    go(tmp_path, Settings(**{**vars(SHORT), "steps": 12, "minutes": 0.0}))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        with pytest.raises(OSError, match=r"checkpoint 4 must fit on the disk; .* good one is .*checkpoint-000001"):
            go(tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    _, rest = go(tmp_path, resume=True)
    _, whole = go(None)
    assert rest.losses == whole.losses[1:]


def test_a_folder_with_a_run_is_not_overwritten_and_other_settings_are_refused(tmp_path):
    go(tmp_path)
    with pytest.raises(ValueError, match="must hold no checkpoint where resume is off; got .*000012. Pass --resume"):
        go(tmp_path)
    with pytest.raises(ValueError, match=r"settings lr must be 0.001 as in .*; got 0.002"):
        go(tmp_path, Settings(**{**vars(SHORT), "lr": 0.002}), resume=True)
    with pytest.raises(ValueError, match="describe vocabulary must be None as in .*; got 9"):
        go(tmp_path, resume=True, describe={"vocabulary": 9})


def test_an_epoch_without_enough_batches_is_refused():
    with pytest.raises(ValueError, match="a batch for each of 1 processes and 9 accumulated; got 8"):
        go(None, Settings(3, accumulate=9))
    with pytest.raises(ValueError, match="the same number of rows, at least one; got .3, 2."):
        Plain(torch.zeros(3), torch.zeros(2), batch=1)


# ---- numbers ----


@pytest.mark.parametrize("schedule", ["cosine", "inverse_sqrt", "constant"])
def test_the_rate_rises_and_then_follows_its_schedule(schedule):
    settings = Settings(100, lr=2.0, warmup=10, schedule=schedule)
    rates = [training.rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[99] == pytest.approx({"cosine": 0.2, "inverse_sqrt": 2 * math.sqrt(0.1), "constant": 2.0}[schedule])
    assert all(one >= other for one, other in itertools.pairwise(rates[9:]))
    with pytest.raises(ValueError, match="schedule must be cosine, inverse_sqrt or constant; got 'flat'"):
        training.rate(100, Settings(200, schedule="flat"))


def test_accumulated_batches_make_the_step_of_one_large_batch():
    model, batches = regression(batch=10)
    x, y = batches.tensors
    model.eval()
    train(nn.ModuleList(), batches, squares, Settings(0))  # no step: nothing is touched
    one, other = nn.Linear(4, 1), nn.Linear(4, 1)
    other.load_state_dict(one.state_dict())
    train(one, Plain(x[:20], y[:20], batch=20), squares, Settings(3, warmup=1))
    train(other, Plain(x[:20], y[:20], batch=5), squares, Settings(3, warmup=1, accumulate=4))
    torch.testing.assert_close(one.weight, other.weight)


def test_the_mean_of_checkpoints_is_their_mean(tmp_path):
    go(tmp_path)
    kept = checkpoints.snapshots(tmp_path)
    assert [path.name for path in kept] == [f"weights-{step:06d}.safetensors" for step in (4, 8, 12)]
    mean = checkpoints.average(kept)
    expected = torch.stack([load_file(path)["0.weight"] for path in kept]).double().mean(0)
    torch.testing.assert_close(mean["0.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    checkpoints.write_weights(tmp_path / "other.safetensors", {"0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be of one model"):
        checkpoints.average([*kept, tmp_path / "other.safetensors"])
    with pytest.raises(ValueError, match="at least one; got none"):
        checkpoints.average([])


def test_adapters_alone_are_trained_and_begin_as_nothing(native):
    from regard.models import GPT

    pytest.importorskip("peft", reason="needs tool: peft")
    torch.manual_seed(0)
    model = GPT(20, dim=16, num_layers=1)
    tokens = torch.randint(20, (8, 6))
    before = model.loss(tokens)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags.add_lora(model, 2)
    torch.testing.assert_close(model.loss(tokens), before)
    train(model, Plain(tokens, batch=4), lambda m, t: m.loss(t), Settings(20, lr=0.01, warmup=2))
    assert model.loss(tokens) < before
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name.replace(".base_layer", "")])


# ---- translation ----


@pytest.fixture
def files(tmp_path):
    def write(source: bytes | str, target: bytes | str) -> tuple[Path, Path]:
        made = tmp_path / "a.en", tmp_path / "a.fr"
        for path, content in zip(made, (source, target), strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return made

    return write


def test_pairs_are_read_line_by_line(files):
    text = "a\u2028cat\r\n\n it \n"
    assert translate.read_pairs(*files(text, "un chat\n\nil"), "fr") == [
        ("a\u2028cat", "un chat", "fr"),
        ("it", "il", "fr"),
    ]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a\nb\n", "a\n", "the same number of lines; got 2 and 1"),
        ("a\nb\n", "a\n \n", "line 2 must have a text in .*; got it blank in .*a.fr"),
        ("", "", "must hold lines of text; got none"),
        ("a", "été".encode("latin1"), "must be UTF-8; got byte 0xe9 at 0"),
    ],
)
def test_files_that_are_no_pairs_are_refused(files, source, target, message):
    with pytest.raises(ValueError, match=message):
        translate.read_pairs(*files(source, target), "fr")


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, native):
    pairs = [("a cat", "un chat", "fr"), ("a dog", "un chien", "fr")]
    tokenizer = translate.make_tokenizer(pairs, 300, ["fr"])
    size = tokenizer.get_vocab_size()
    model = translate.Seq2Seq(size + 1, dim=16, num_heads=2, num_layers=1)
    translate.save(tmp_path, model, tokenizer, {})
    with pytest.raises(ValueError, match=f"the model's {size + 1} tokens; got {size}"):
        translate.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json must be a tokenizer"):
        translate.load(tmp_path)
    with pytest.raises(ValueError, match="one that the model was trained for; got 'de'"):
        translate.tag(tokenizer, "de")
    with pytest.raises(ValueError, match="at least one pair must have at most 256 tokens"):
        translate.Sentences([("z" * 999, "z", "fr")], tokenizer, 2)


def test_a_translator_learns_a_tiny_language_by_heart(native):
    words = "one two three four five six".split()
    pairs = [(" ".join(words[i:j]), " ".join(reversed(words[i:j])), "fr") for i in range(6) for j in range(i + 1, 7)]
    tokenizer = translate.make_tokenizer(pairs, 280, ["fr"])
    torch.manual_seed(0)
    model = translate.Seq2Seq(tokenizer.get_vocab_size(), dim=48, num_heads=2, num_layers=1, hidden=96)
    train(model, translate.Sentences(pairs, tokenizer, 7), translate.smoothed, Settings(240, lr=4e-3, warmup=20))
    written = translate.translate(model.eval(), tokenizer, [s for s, _, _ in pairs], "fr", num_beams=3, batch=8)
    assert written == [t for _, t, _ in pairs]
    scores = translate.bleu(written * 3, [t for _, t, _ in pairs] * 3)
    assert scores["bleu"] == pytest.approx(100)


def run_recipe(name: str, *arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src")},
    )  # fmt: skip


def test_the_short_form_of_translation_beats_frequencies_and_copies(tmp_path, native):
    folder = data("multi30k")
    ran = run_recipe("translate", "--short", "--to", "fr", "--data", folder, "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr[-2000:]
    scores = json.loads((tmp_path / "run" / "model" / "scores.json").read_text("utf-8"))
    # the baselines: one who knows how frequent each token is; one who copies the English
    assert scores["val_loss"] < scores["unigram"] - 1.5
    english, french = (
        (folder / f"test_2016_flickr.{end}").read_text("utf-8").splitlines()[:100] for end in ("en", "fr")
    )
    assert scores["test"]["fr"]["bleu"] > translate.bleu(english, french)["bleu"]
    assert sum(file.stat().st_size for file in (tmp_path / "run" / "model").iterdir()) < 12e6
    (tmp_path / "ask").write_text("A man is walking.\n")
    ran = run_recipe("translate", "--to", "fr", "--out", tmp_path / "run", "--text", tmp_path / "ask")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "homme" in ran.stdout


def test_the_short_form_of_the_language_model_beats_frequencies(tmp_path, native):
    data("tinyshakespeare")
    ran = run_recipe("language_model", "--short", "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr[-2000:]
    scores = json.loads((tmp_path / "run" / "model" / "scores.json").read_text("utf-8"))
    assert scores["unigram"] == pytest.approx(3.347, abs=0.01)  # nats a character of one who knows frequencies alone
    assert scores["nats_per_character"] < scores["unigram"] - 1.0
    assert set("the ") <= set(scores["sample"])


def test_a_refusal_of_a_recipe_is_one_sentence(tmp_path):
    (tmp_path / "empty").write_text("")
    ran = run_recipe("language_model", "--short", "--text", tmp_path / "empty", "--out", tmp_path / "run")
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: translate: ")
    assert "must hold lines of text; got none" in ran.stderr
    assert "Traceback" not in ran.stderr


# ---- texts ----


def test_a_vocabulary_of_characters_gives_its_text_back():
    vocabulary = language_model.Characters.of("hello\n")
    assert vocabulary.decode(vocabulary.encode("hello").tolist()) == "hello"
    assert vocabulary.decode(vocabulary.encode("hé").tolist()) == "h\ufffd"
    pieces = language_model.Pieces.of("hello hello\nhello", 270)
    assert pieces.decode(pieces.encode("hello é\nhello").tolist()) == "hello é\nhello"


def test_windows_cover_the_text_and_too_short_a_text_is_refused():
    windows = language_model.Windows(torch.arange(100), 8, 3)
    starts = sorted(start for batch in windows.order(torch.Generator().manual_seed(0)) for start in batch)
    assert starts == list(range(starts[0], 92, 8))
    assert windows.load(starts[:2])[0].tolist() == [list(range(s, s + 9)) for s in starts[:2]]
    with pytest.raises(ValueError, match="at least 17 tokens; got 16"):
        language_model.Windows(torch.arange(16), 8, 3)
