"""`regard bench`: the same function on every side, held processes, joined files, tables. No time is ever asserted."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from regard import cli
from regard.bench import ceilings, held, peers, report
from regard.bench.cases import Case, inputs
from regard.bench.column import line
from regard.bench.measure import Unequal, check, expected, measure
from regard.bench.model import ModelCase, measure_task, model_cases
from regard.bench.plot import plot, points
from regard.bench.results import Results, check_item, read
from regard.bench.rows import ROWS, Row, class_of, sweep_cases, table_cases
from regard.bench.run import Options, bench, items
from regard.bench.timing import race, summary

CHECKOUT = Path(__file__).resolve().parents[1]
SECONDS = {"median": 1e-3, "low": 9e-4, "high": 1.1e-3, "best": 9e-4, "samples": 5}
NOW = ceilings.Ceilings(400.0, 800.0, None, 40.0, 50.0)


def item(regard=1e-3, **others):
    seconds = {who: {**SECONDS, "median": median} for who, median in {"regard": regard, **others}.items()}
    return {
        "taken": "2026-03-01T10:00:00+00:00", "isa": "avx512", "torch_isa": "AVX512", "quick": False, "commit": "abc",
        "seconds": seconds, "absent": {}, "errors": dict.fromkeys(seconds, 1e-07), "share": 0.5, "bound": "FMA peak",
        "ceilings": dataclasses.asdict(NOW), "tokens": 2048, "prepared": {}, "agreement": 1.0,
    }  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


# --- the cases --------------------------------------------------------------------------------------------------------


def by_work():
    """One case of each kind of work that the table and the sweeps hold."""
    cases = {}
    for case in [*table_cases(), *sweep_cases()]:
        cases.setdefault((case.kind, case.mask, case.dtype, case.precision, case.num_kv_heads, case.sweep), case)
    return [pytest.param(case, id=case.name) for case in cases.values()]


@pytest.mark.parametrize("case", by_work())
def test_both_sides_compute_the_same_function(case, native):
    small = dataclasses.replace(case.small(100), batch=min(case.batch, 2))
    given = inputs(small)
    field = peers.contenders(small, given, foreign=False)
    assert set(field.calls) >= ({"regard", "plain"} if case.kind == "statistics" else {"regard", "torch"})
    errors = check(small, given, field)
    assert set(errors) == (set() if case.kind == "forward+backward" else set(field.calls))


@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_other_libraries_compute_the_same_function(peer, dtype, mask, native):
    if find_spec(peer) is None or find_spec("onnx") is None:
        pytest.skip(f"{peer} is not installed (the extra bench)")
    case = Case("forward", dtype, 70, 64, mask or "dense")
    field = peers.contenders(case, given := inputs(case))
    if peer == "onnxruntime" and (mask or dtype != "float32"):
        assert "neither mask" in field.absent[peer]
    else:
        assert peer in field.calls, field.absent
        assert peer in check(case, given, field)


def test_a_contender_that_computes_something_else_is_no_contender(native):
    case = Case("forward", "float32", 40, 16)
    given = inputs(case)
    field = peers.contenders(case, given, foreign=False)
    field.calls["wrong"] = lambda: given.next()[2] * 2
    with pytest.raises(Unequal, match="dense forward float32 40 x 16: wrong must compute what regard computes"):
        check(case, given, field)
    case = dataclasses.replace(case, kind="forward+backward")
    given = inputs(case)
    field = peers.contenders(case, given, foreign=False)
    field.calls["wrong"] = lambda: tuple(torch.ones_like(t) for t in given.next())
    with pytest.raises(Unequal, match="wrong must have regard's gradient of q"):
        check(case, given, field)


@pytest.mark.parametrize("case", [Case("forward", "float32", 37, 8, mask, 5) for mask in ("window", "documents")])
def test_pairs_are_those_that_the_mask_keeps(case):
    seen = case.bool_mask()
    assert case.pairs == seen.sum().item()
    assert case.flops == 4 * 8 * case.pairs * 8
    q, k, v = inputs(case).sets[0]
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    torch.testing.assert_close(expected(case, q, k, v, torch.arange(37)), exact)


def test_decoding_reads_other_keys_in_each_call():
    case = Case("decode", "bfloat16", 8192, 128, num_heads=32, num_kv_heads=8)
    assert case.moved == pytest.approx(2 * 8 * 8192 * 128 * 2, rel=1e-2)
    given = inputs(dataclasses.replace(case, seq_len=1 << 15))
    assert len(given.sets) == 2
    given.turning = False
    assert given.next()[1] is given.next()[1]
    given.turning = True
    assert given.next()[1] is not given.next()[1]


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in [*table_cases(), *sweep_cases(), *model_cases()]]
    assert len(set(names)) == len(names)
    assert {case.seq_len for case in sweep_cases()} >= {512, 131_072}
    assert set(table_cases(quick=True)) < set(table_cases())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "backward"},
            "Case: kind must be one of forward, forward+backward, decode, statistics; got 'backward'",
        ),
        ({"dtype": "float64"}, "Case: dtype must be one of float32, bfloat16, float16; got 'float64'"),
        ({"mask": "window"}, "Case: reach must be at least 1 under a window mask; got 0"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Case(**{"kind": "forward", "dtype": "float32", "seq_len": 8, "head_dim": 8, **changes})


# --- measuring --------------------------------------------------------------------------------------------------------


def test_an_item_holds_what_its_form_asks_for(native):
    case = Case("forward", "float32", 64, 16, "window", 8)
    found = measure(case, seconds=0.01, quick=True)
    assert check_item(case.name, {**item(), **found})
    assert found["absent"]["flex"] == "not asked for"
    assert found["bound"] in ("FMA peak", "read bandwidth")
    assert found["share"] > 0
    assert set(found["errors"]) == {"regard", "torch"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert line(case.name, found).startswith(f"{case.name}: ")


def test_a_call_that_would_take_too_long_is_left_out_with_its_reason(native):
    case = Case("forward", "float32", 131_072, 64, sweep=True)
    found = measure(case, longest=1e-3, quick=True)
    assert found["seconds"] == {}
    assert found["skipped"].startswith("a call would take some ")
    assert line(case.name, found).startswith("length dense forward float32 131072 x 64: left out, a call would take")


def test_pytorch_is_left_out_where_its_mask_would_not_fit():
    case = Case("forward", "float32", 1 << 17, 8, "window", 4, sweep=True)
    field = peers.contenders(case, inputs(case), foreign=False)
    assert set(field.calls) == {"regard"}
    assert field.absent["torch"] == "its bool mask would take 16 GiB"


def test_precision_is_given_back(native):
    case = Case("forward", "float32", 64, 16, precision="high")
    before = torch.get_float32_matmul_precision()
    measure(case, seconds=0.01, quick=True)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "portable"])
def test_every_ceiling_is_there_on_every_instruction_set(isa, native):
    from regard.native import forced_isa, isas

    if isa not in isas():
        pytest.skip("this processor lacks it")
    with forced_isa(isa):
        found = ceilings.measure(1)
    assert found.float32_gflops > 0 and found.read_gb_per_s > 0 and found.copy_gb_per_s > 0
    assert (found.pairs_gflops is not None) == (isa == "avx512_bf16")
    name, rate = found.peak("bfloat16")
    assert (name, rate) == (("pair peak", found.pairs_gflops) if isa == "avx512_bf16" else ("FMA peak", rate))
    assert found.peak("float32") == ("FMA peak", found.float32_gflops)


def test_ceilings_count_what_they_do(native):
    from regard.native import isa_number, kernels

    data = torch.arange(3_000_001, dtype=torch.float32)
    copied, sums = torch.zeros_like(data), torch.full((3,), torch.nan)
    call = kernels().ceiling
    assert call(isa_number(), ceilings.COPY, 0, data.data_ptr(), copied.data_ptr(), data.nbytes, 2) == 2 * data.nbytes
    assert torch.equal(copied, data)
    assert call(isa_number(), ceilings.READ, 0, data.data_ptr(), sums.data_ptr(), data.nbytes, 2) == data.nbytes
    assert sums.sum().item() == pytest.approx(data.double().sum().item(), rel=1e-4)
    flops = call(isa_number(), ceilings.FLOAT32, 100, 0, 0, 0, 2)
    assert flops == 100 / 50 * call(isa_number(), ceilings.FLOAT32, 50, 0, 0, 0, 1)
    assert call(isa_number(), 99, 100, 0, 0, 0, 2) == 0


def test_all_take_their_turns():
    order = []
    timings = race({name: lambda name=name: order.append(name) for name in "ab"}, seconds=0, least=4, most=5)
    assert {timing.samples for timing in timings.values()} == {4}
    assert order[:2] == ["a", "b"]  # how long a call takes
    assert abs(order.count("a") - order.count("b")) < 0.9 * len(order)
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]).spread == 1.0
    with pytest.raises(ValueError, match="race: calls must be there and 1 <= least <= most; got 0 calls, least 3"):
        race({})


# --- a column's process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_a_held_process_is_held(isa, native):
    from regard.native import isas

    if isa not in isas():
        pytest.skip("this processor lacks it")
    environment = held.environment(isa)
    assert environment["REGARD_ISA"] == isa
    assert {environment[name] for name in held.NAMES[1:]} == set(held.HELD[isa])
    program = "import torch; from regard import native; print(native.isa(), torch.backends.cpu.get_cpu_capability())"
    seen = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "PYTHONPATH": str(CHECKOUT / "src")},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert seen == [isa, held.HELD[isa][0].upper()]


def test_the_best_column_changes_nothing():
    assert held.environment("best") == dict(os.environ)
    assert held.environment("best", {"ATEN_CPU_CAPABILITY": "avx2"}) == {"ATEN_CPU_CAPABILITY": "avx2"}


def test_columns_join_in_one_file_and_resume(tmp_path, native, monkeypatch):
    monkeypatch.setattr("regard.bench.run.disturbed", lambda item: item["others"] == 9)
    file, said = tmp_path / "bench.json", []
    options = Options(only=("causal forward float32 512",), quick=True, seconds=0.05, columns=("best", "portable"))
    found = bench(options, file, said.append)
    assert set(found.columns) == {"best", "portable"}
    name = "causal forward float32 512 x 64"
    assert found.columns["portable"][name]["isa"] == "portable"
    assert found.columns["portable"][name]["torch_isa"] == "DEFAULT"
    assert any(line.startswith(f"  {name}: ") for line in said)
    before = file.read_bytes()
    more = Options(
        only=("causal forward float32 512", "small"[:0] or "statistics float32"), quick=True, seconds=0.05, resume=True
    )
    bench(more, file, said.append)
    assert "[best] 1 items to measure, 1 kept" in said
    assert set(read(file)["columns"]["best"]) == {name, "dense statistics float32 2048 x 64"}
    held = read(file)
    assert json.loads(before)["columns"]["best"][name] == held["columns"]["best"][name]
    held["columns"]["best"][name]["others"] = 9
    file.write_text(json.dumps(held))
    bench(more, file, said.append)  # what was disturbed is measured again
    assert read(file)["columns"]["best"][name]["others"] < 9


def test_a_spent_budget_leaves_the_rest(tmp_path, native):
    said = []
    options = Options(only=("causal",), quick=True, seconds=0.05, budget=1e-9)
    assert bench(options, tmp_path / "bench.json", said.append).columns == {}
    assert "  the budget is spent; 2 items are left for --resume" in said


def test_a_process_that_fails_is_told(tmp_path, native, monkeypatch):
    from regard.bench import run as module

    monkeypatch.setattr(module, "items", lambda options: ["no such item"])
    with pytest.raises(RuntimeError, match="bench: the process of column best must end well; got status 1"):
        bench(Options(), tmp_path / "bench.json", lambda line: None)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_results_are_read_back(tmp_path):
    file, machine = tmp_path / "deep" / "bench.json", {"processor": "one", "versions": {}, "threads": 2}
    Results(file, machine).put("best", "dense", item(torch=2e-3))
    assert Results(file, machine).has("best", "dense")
    assert not Results(file, machine).has("avx2", "dense")
    assert [left.name for left in file.parent.iterdir()] == ["bench.json"]
    with pytest.raises(ValueError, match="on this machine with these versions; got threads 2 where it is 1 now"):
        Results(file, {**machine, "threads": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "bench.json must be JSON; got something else"),
        ("[]", "must have schema 1, machine and columns"),
        ('{"schema": 0, "machine": {}, "columns": {}}', "must have schema 1, machine and columns"),
        ('{"schema": 1, "machine": {}, "columns": {"best": []}}', "columns of bench.json must be objects; got list"),
        ('{"schema": 1, "machine": {}, "columns": {"best": {"a": {}}}}', "item 'a' must have taken as str; got none"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, message):
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(file)


@pytest.mark.parametrize(("part", "value"), [("median", 0.0), ("high", float("nan")), ("low", None), ("best", "1")])
def test_seconds_are_positive_numbers(part, value):
    broken = item()
    broken["seconds"]["regard"][part] = value
    with pytest.raises(ValueError, match="must have median, low, high, best, samples of regard above 0"):
        check_item("dense", broken)


# --- the tables -------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_issue():
    asked = {row.title: row.asked for row in ROWS}
    assert asked["forward bfloat16, D 64"] == (3.5, 1.5, 1.2)
    assert asked["window, forward + backward float32"] == (15, 12, 10)
    assert asked["decode 32/8 bfloat16, batch 8"] == (4.0, 4.0, 2.5)
    assert all(row.cases and len(row.asked) == 3 for row in ROWS)
    assert {class_of(isa) for isa in ("amx", "avx512", "avx2", "portable")} == {0, 1, 2, None}


@pytest.mark.parametrize(
    ("figure", "reached", "good"),
    [
        ("ratio", 3.0, 2.9),
        ("cost", 1 / 3, 0.4),
        ("share", 0.5, 0.4),
        ("error", 1.0, 1.0),
        ("largest error", 1e-7, 2e-7),
    ],
)
def test_a_figure_is_reached_or_falls_short(figure, reached, good):
    case = Case("forward", "float32", 8, 8)
    row = Row("row", (case,), figure, (good, good, good))
    items = {case.name: item(1e-3, torch=3e-3)}
    assert row.reached({}) is None
    assert row.reached(items) == pytest.approx(reached)
    assert row.whole(items) and not row.whole({})
    assert row.met(reached, good)
    assert not row.met(reached, good * (0.4 if row.lower else 2))


def every_item():
    found = {case.name: item(torch=2e-3, flex=8e-3, plain=8e-4) for case in table_cases()}
    lengths = {case.name: item(1e-6 * case.seq_len, torch=1e-9 * case.seq_len**2) for case in sweep_cases()}
    return {**found, **lengths, **{case.name: item(torch=2e-3) for case in model_cases()}}


def test_tables_show_reached_beside_asked_and_mark_what_falls_short(tmp_path):
    columns, machine = {"best": every_item(), "avx2": every_item()}, {"processor": "one", "isas": [], "threads": 2}
    table = report.asked_table(columns)
    assert len(table.rows) == len(ROWS)
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["forward bfloat16, D 64"] == "2 / 1.5"
    assert rows["window 512 of 8,192 float32"] == "2† / 18"
    assert rows["statistics over plain forward, at most"] == "1.25 / 1.6"
    assert ("best", "window 512 of 8,192 float32", 2.0, 18) in report.short_rows(columns)
    document, picture = tmp_path / "RESULTS.md", tmp_path / "lengths.svg"
    document.write_text(f"before\n{report.OPENING}\nold\n{report.CLOSING}\nafter\n")
    report.fill(document, {**machine, "versions": {"torch": "2"}}, columns, picture)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| forward bfloat16, D 64 | 2 / 1.5 |" in text
    assert "(lengths.svg)" in text
    assert all(
        line.count("|") == text.splitlines()[index - 1].count("|")
        for index, line in enumerate(text.splitlines())
        if line.startswith("| ---")
    )
    document.write_text("no markers")
    with pytest.raises(ValueError, match="RESULTS.md must hold <!-- measured"):
        report.fill(document, machine, columns)


def test_an_unfinished_row_says_so():
    case = next(case for case in table_cases() if case.name == "dense forward bfloat16 2048 x 64")
    table = report.asked_table({"best": {case.name: item(torch=4e-3)}})
    assert ["forward bfloat16, D 64", "4* / 1.5"] in [list(row) for row in table.rows]


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    assert plot(one, every_item())
    assert plot(two, every_item())
    assert one.read_bytes() == two.read_bytes()
    assert all(words in one.read_text() for words in ("O(n)", "O(n²)", "window, regard", "tokens"))
    assert points(every_item(), "float32")[("dense", "regard")][0] == (512, pytest.approx(5.12e-4))
    assert not plot(tmp_path / "none.svg", {})


# --- the model, and the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["prefill", "generate"])
def test_a_model_does_the_same_on_both(task, native):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(50, (1, 40))
    found = measure_task(ModelCase(task, "float32", 40, 5), model, ids, seconds=0.01)
    assert found["agreement"] == 1.0
    assert found["tokens"] == (40 if task == "prefill" else 5)
    assert set(found["seconds"]) == {"regard", "torch"}
    assert check_item("model", {**item(), **found})


def test_the_command_measures_shows_and_writes(tmp_path, native):
    file, document = tmp_path / "bench.json", tmp_path / "RESULTS.md"
    arguments = ["causal forward float32", "--quick", "--seconds", 0.05, "--json", file, "--markdown", document]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "causal float32, length 512" in result.output
    assert "causal float32, length 512" in document.read_text()
    shown = run("--show", "--json", file)
    assert shown.exit_code == 0
    assert "causal forward float32 512 x 64" in shown.output
    listed = run("--list", "smollm2")
    assert listed.output.splitlines()[0] == "smollm2 prefill of 4096 float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "sse9"], "bench: isa must be one of best, "),
        (["nothing*here"], "bench: only must fit an item's name; got 'nothing*here', which fits none. See --list."),
        (["--seconds", "0"], "bench: seconds must be above 0; got 0.0. Pass a positive number."),
        (["--budget", "-1"], "bench: budget must be above 0; got -1.0."),
        (["--threads", "0"], "bench: threads must be above 0; got 0."),
        (["--resume"], "bench: --resume must have a file to read; got none. Name it with --json FILE."),
        (["--show", "--json", "not_there.json"], "bench: --json must name a file that exists; got not_there.json."),
        (["--plot", "lengths.png"], "bench: plot must be a .svg file; got lengths.png. Rename it."),
    ],
)
def test_a_bad_argument_is_one_sentence(arguments, message, native):
    refused = run(*arguments)
    assert refused.exit_code == 1
    assert message in refused.output


def test_items_are_chosen_by_words_and_patterns(native):
    assert items(Options(only=("decode*bfloat16*batch 8",))) == ["dense decode bfloat16 batch 8 32/8 heads 8192 x 128"]
    assert items(Options(quick=True)) != items(Options())
