"""Linear attention: the four rules against their recurrence in float64; states; bad input; feature maps."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import linear_attention, linear_op, native
from regard.linear import RULES, elu_plus_one, random_features

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def example(
    rule: str,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    seq_len: int = 150,
    head_dim: int = 24,
    head_dim_v: int = 20,
    strength: float = 0.3,
    per_column: bool = True,
    state: bool = True,
) -> dict[str, Tensor]:
    """Random arguments; keys of length 1, so that the delta rules stay bounded."""
    wide = linear_op.wide(dtype)
    k = torch.nn.functional.normalize(torch.randn(batch, num_kv_heads, seq_len, head_dim), dim=-1)
    arguments = {
        "q": torch.randn(batch, num_heads, seq_len, head_dim).to(dtype),
        "k": k.to(dtype),
        "v": torch.randn(batch, num_kv_heads, seq_len, head_dim_v).to(dtype),
    }
    if "gated" in rule:
        columns = head_dim if per_column else 1
        arguments["decay"] = -strength * torch.rand(batch, num_kv_heads, seq_len, columns, dtype=wide)
    if "delta" in rule:
        arguments["beta"] = torch.rand(batch, num_kv_heads, seq_len, 1, dtype=wide)
    if state:
        arguments["state"] = torch.randn(batch, num_kv_heads, head_dim, head_dim_v, dtype=wide)
    return arguments


def expected(arguments: dict[str, Tensor], scale: float = 0.3) -> tuple[Tensor, Tensor]:
    gates = (arguments.get(name) for name in ("decay", "beta", "state"))
    return linear_op.recurrence(arguments["q"], arguments["k"], arguments["v"], *gates, scale)


def off(got: Tensor, want: Tensor) -> float:
    """Relative error of the whole tensor."""
    got, want = got.detach().double(), want.detach()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def allowed(dtype: torch.dtype) -> float:
    """Sums in the wide type round about once a step in their own chain; a half type rounds the result once."""
    wide = linear_op.wide(dtype)
    return 64 * torch.finfo(wide).eps + (dtype != wide) * torch.finfo(dtype).eps


CASES = [
    (rule, per_column, strength)
    for rule in RULES
    for per_column in ((True, False) if "gated" in rule else (False,))
    for strength in ((0.3, 20.0) if "gated" in rule else (0.0,))  # 20: e^-10 a step, beyond any factored chunk
]


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "per_column", "strength"), CASES)
def test_out_state_and_gradients_match_the_recurrence(rule, per_column, strength, dtype, isa):
    torch.manual_seed(0)
    ours = {
        name: t.requires_grad_() for name, t in example(rule, dtype, per_column=per_column, strength=strength).items()
    }
    exact = {name: t.detach().double().requires_grad_() for name, t in ours.items()}
    with native.forced_isa(isa):
        out, state = linear_attention(**ours, rule=rule, scale=0.3)
        assert out.dtype == dtype and state.dtype == linear_op.wide(dtype)
        want, want_state = expected(exact)
        weight, state_weight = torch.randn(out.shape).to(dtype), torch.randn(state.shape).to(state.dtype)
        torch.autograd.backward((out, state), (weight, state_weight))
        torch.autograd.backward((want, want_state), (weight.double(), state_weight.double()))
    assert off(out, want) < allowed(dtype)
    assert off(state, want_state) < allowed(state.dtype)
    for name, t in ours.items():
        assert t.grad is not None and t.grad.dtype == t.dtype
        assert off(t.grad, exact[name].grad) < allowed(t.dtype), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_column", [True, False])
def test_gradients_match_finite_differences(rule, per_column):
    torch.manual_seed(0)
    sizes = {"batch": 1, "num_heads": 2, "num_kv_heads": 1, "seq_len": 7, "head_dim": 3, "head_dim_v": 2}
    arguments = example(rule, torch.float64, per_column=per_column, strength=2.0, **sizes)
    names = list(arguments)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(names, tensors, strict=True)), rule=rule, scale=-0.7, chunk_size=3)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in arguments.values()])


@pytest.mark.parametrize(("rule", "per_column", "strength"), CASES)
def test_the_chunk_size_changes_rounding_alone(rule, per_column, strength):
    arguments = example(rule, torch.float64, per_column=per_column, strength=strength)
    whole = linear_attention(**arguments, rule=rule)
    for chunk_size in (1, 7, 16, 65, 256):
        for got, want in zip(linear_attention(**arguments, rule=rule, chunk_size=chunk_size), whole, strict=True):
            assert off(got, want) < 1e-13


@pytest.mark.parametrize(("rule", "per_column", "strength"), CASES)
def test_a_state_handed_on_continues_the_sequence(rule, per_column, strength):
    arguments = example(rule, torch.float64, per_column=per_column, strength=strength)
    want, want_state = linear_attention(**arguments, rule=rule)
    state, parts = arguments.pop("state"), []
    for start, stop in ((0, 64), (64, 65), (65, 65), (65, 131), (131, 150)):
        part, state = linear_attention(
            **{name: t[:, :, start:stop] for name, t in arguments.items()}, state=state, rule=rule
        )
        parts.append(part)
    assert off(torch.cat(parts, 2), want) < 1e-13
    assert off(state, want_state) < 1e-13


def test_half_types_stream_without_losing_the_state():
    arguments = example("gated_delta", torch.bfloat16)
    want, want_state = linear_attention(**arguments, rule="gated_delta")
    state, parts = arguments.pop("state"), []
    for start in range(0, 150, 10):
        steps = {name: t[:, :, start : start + 10] for name, t in arguments.items()}
        part, state = linear_attention(**steps, state=state, rule="gated_delta")
        parts.append(part)
    assert off(state, want_state.double()) < allowed(torch.float32)
    assert off(torch.cat(parts, 2), want.double()) < allowed(torch.bfloat16)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_column", [True, False])
def test_any_number_of_threads_gives_the_same_bits(rule, per_column):
    # head_dim_v above 64: fewer heads than threads split its columns
    arguments = example(rule, batch=1, num_heads=2, num_kv_heads=1, head_dim=64, head_dim_v=150, per_column=per_column)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
            out, state = linear_attention(**leaves, rule=rule)
            (out.square().sum() + state.square().sum()).backward()
            results.append([out, state, *(t.grad for t in leaves.values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_does_not_depend_on_its_batch():
    arguments = example("gated_delta", batch=3)
    whole = linear_attention(**arguments, rule="gated_delta")
    alone = linear_attention(**{name: t[1:2] for name, t in arguments.items()}, rule="gated_delta")
    assert all(torch.equal(a[1:2], b) for a, b in zip(whole, alone, strict=True))


def test_a_call_that_needs_no_gradient_gives_the_same_bits():
    arguments = example("gated_delta")
    plain = linear_attention(**arguments, rule="gated_delta")
    recorded = linear_attention(**{name: t.requires_grad_() for name, t in arguments.items()}, rule="gated_delta")
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(plain, recorded, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_any_strides_give_the_same_bits(rule):
    arguments = example(rule)
    want = linear_attention(**arguments, rule=rule)

    def odd(t: Tensor) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        wide[..., ::2] = t
        return wide[..., ::2]

    for got, same in zip(linear_attention(**{n: odd(t) for n, t in arguments.items()}, rule=rule), want, strict=True):
        assert torch.equal(got, same)


def test_one_beta_serves_all_heads():
    arguments = example("delta", torch.float64)
    shared = arguments["beta"][:, :1].clone().requires_grad_()
    each = shared.detach().expand(-1, 2, -1, -1).clone().requires_grad_()
    one = linear_attention(**{**arguments, "beta": shared}, rule="delta")[0]
    two = linear_attention(**{**arguments, "beta": each}, rule="delta")[0]
    assert torch.equal(one, two)
    one.square().sum().backward()
    two.square().sum().backward()
    torch.testing.assert_close(shared.grad, each.grad.sum(1, keepdim=True))


@pytest.mark.parametrize("per_column", [True, False])
@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_a_decay_of_minus_infinity_forgets_everything(rule, per_column):
    arguments = example(rule, per_column=per_column)
    arguments["decay"][:, :, 70] = -math.inf
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    out, state = linear_attention(**leaves, rule=rule)
    after = {name: t.detach()[:, :, 70:] for name, t in arguments.items() if name != "state"}
    fresh, fresh_state = linear_attention(**after, rule=rule)
    assert off(out[:, :, 70:], fresh.double()) < allowed(torch.float32)
    assert off(state, fresh_state.double()) < allowed(torch.float32)
    state.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves.values())
    assert (leaves["state"].grad == 0).all() and (leaves["v"].grad[:, :, :70] == 0).all()
    assert (leaves["decay"].grad[:, :, 70] == 0).all()


@pytest.mark.parametrize("per_column", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_nan_reaches_no_step_before_it(rule, per_column):
    arguments = example(rule, per_column=per_column)
    clean = linear_attention(**arguments, rule=rule)[0]
    for name in set(arguments) - {"state"}:
        broken = {**arguments, name: arguments[name].clone()}
        broken[name][:, :, 90] = math.nan
        out = linear_attention(**broken, rule=rule)[0]
        torch.testing.assert_close(out[:, :, :90], clean[:, :, :90], msg=name)
        assert out[:, :, 90].isnan().all(), name


def test_growth_is_computed_too():
    arguments = example("gated", torch.float64, seq_len=40)
    arguments["decay"] = -arguments["decay"]
    got, want = linear_attention(**arguments, rule="gated", scale=0.3), expected(arguments)
    assert all(off(a, b) < 1e-12 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_no_steps_leave_the_state_as_it_was(rule):
    arguments = example(rule, seq_len=0)
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    out, state = linear_attention(**leaves, rule=rule)
    assert out.shape == (2, 4, 0, 20)
    assert torch.equal(state, arguments["state"])
    state.sum().backward()
    assert (leaves["state"].grad == 1).all()
    assert linear_attention(**{n: t[:0] for n, t in arguments.items()}, rule=rule)[0].shape == (0, 4, 0, 20)


def test_no_state_is_a_state_of_zeros():
    arguments = example("delta")
    zeros = {**arguments, "state": torch.zeros_like(arguments.pop("state"))}
    for a, b in zip(linear_attention(**arguments, rule="delta"), linear_attention(**zeros, rule="delta"), strict=True):
        assert torch.equal(a, b)


GROWTH = """
import resource, torch, regard
q, k, v = torch.randn(3, 1, 1, 4096, 128).unbind()
decay, beta = -torch.rand(1, 1, 4096, 1), torch.rand(1, 1, 4096, 1) / 128
def run(n):
    parts = (t[:, :, :n] for t in (q, k, v))
    regard.linear_attention(*parts, rule="gated_delta", decay=decay[:, :, :n], beta=beta[:, :, :n])
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_length():
    # 4,096 states of 128 by 128 would take 256 MiB; a fresh process may grow by 32.
    path = os.pathsep.join([str(Path(native.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", GROWTH],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 32 * 1024  # KiB


def test_numpy_arrays_come_back_as_numpy_arrays():
    arguments = example("gated_delta")
    arrays = {name: t.numpy() for name, t in arguments.items()}
    out, state = linear_attention(**arrays, rule="gated_delta")
    assert isinstance(out, np.ndarray) and isinstance(state, np.ndarray)
    want, want_state = linear_attention(**arguments, rule="gated_delta")
    np.testing.assert_array_equal(out, want.numpy())
    np.testing.assert_array_equal(state, want_state.numpy())


# ---- under torch's own machinery ----


@pytest.mark.parametrize("rule", RULES)
def test_opcheck_passes(rule):
    arguments = {name: t.requires_grad_() for name, t in example(rule, seq_len=9).items()}
    tensors = [arguments.get(name) for name in ("q", "k", "v", "decay", "beta", "state")]
    results = torch.library.opcheck(torch.ops.regard.linear_attention.default, (*tensors, 0.3, 4))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("rule", RULES)
def test_compile_traces_the_whole_graph(rule):
    arguments = {name: t.requires_grad_() for name, t in example(rule, seq_len=9).items()}

    def function(arguments: dict[str, Tensor]) -> Tensor:
        out, state = linear_attention(**arguments, rule=rule)
        return out.sum() + state.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments), function(arguments))
    leaves = list(arguments.values())
    for ours, theirs in zip(
        torch.autograd.grad(compiled(arguments), leaves), torch.autograd.grad(function(arguments), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# ---- bad input ----

SHAPED = example("gated_delta", seq_len=5)
REFUSED = {
    "rule": (
        {"rule": "fast"}, ("q", "k", "v"), ValueError,
        "linear_attention: rule must be one of linear, gated, delta, gated_delta; got 'fast'. Leave it out for "
        "'linear'.",
    ),
    "lengths": (
        {"q": SHAPED["q"][:, :, :3]}, ("k", "v"), ValueError,
        "linear_attention: q and k must have one seq_len; got 3 and 5. Each step has a query and a key: hand the "
        "earlier steps over as state.",
    ),
    "decay missing": (
        {"rule": "gated"}, ("q", "k", "v"), TypeError,
        "linear_attention: decay must be a tensor for rule 'gated'; got NoneType. Give one number a step, or choose "
        "another rule.",
    ),
    "decay not wanted": (
        {"rule": "delta"}, ("q", "k", "v", "decay", "beta"), ValueError,
        "linear_attention: decay must be None for rule 'delta'; got a Tensor. Choose rule='gated' or 'gated_delta'.",
    ),
    "beta not wanted": (
        {}, ("q", "k", "v", "beta"), ValueError,
        "linear_attention: beta must be None for rule 'linear'; got a Tensor. Choose rule='delta' or 'gated_delta'.",
    ),
    "shape of decay": (
        {"rule": "gated", "decay": torch.zeros(2, 4, 5, 1)}, ("q", "k", "v"), ValueError,
        "linear_attention: decay must be (2, 2, 5, 24) or (2, 2, 5, 1); got (2, 4, 5, 1). Reshape it.",
    ),
    "shape of beta": (
        {"rule": "delta", "beta": torch.zeros(2, 2, 5)}, ("q", "k", "v"), ValueError,
        "linear_attention: beta must be (2, 2, 5, 1) or (2, 1, 5, 1); got (2, 2, 5). Reshape it.",
    ),
    "shape of state": (
        {"state": torch.zeros(2, 2, 20, 24)}, ("q", "k", "v"), ValueError,
        "linear_attention: state must be (2, 2, 24, 20); got (2, 2, 20, 24). Reshape it.",
    ),
    "dtype of state": (
        {"state": torch.zeros(2, 2, 24, 20).double()}, ("q", "k", "v"), TypeError,
        "linear_attention: state must be torch.float32; got torch.float64. Convert it with .to(torch.float32).",
    ),
    "kind of state": (
        {"state": [0.0]}, ("q", "k", "v"), TypeError,
        "linear_attention: state must be a tensor; got list. Pass torch.tensor(...).",
    ),
    "scale": (
        {"scale": math.nan}, ("q", "k", "v"), ValueError,
        "linear_attention: scale must be finite; got nan. Leave it out for 1/sqrt(head_dim).",
    ),
    "chunk below 1": (
        {"chunk_size": 0}, ("q", "k", "v"), ValueError,
        "linear_attention: chunk_size must be an int of at least 1; got 0. Give a whole number.",
    ),
    "chunk above 256": (
        {"chunk_size": 257}, ("q", "k", "v"), ValueError,
        "linear_attention: chunk_size must be at most 256; got 257. Leave it out for 64.",
    ),
    "heads": (
        {"q": torch.zeros(2, 3, 5, 24)}, ("k", "v"), ValueError,
        "linear_attention: num_heads must be a multiple of num_kv_heads; got 3 and 2. Change the number of k/v heads.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_the_fix(case):
    given, taken, kind, message = REFUSED[case]
    with pytest.raises(kind) as caught:
        linear_attention(**{**{name: SHAPED[name] for name in taken}, **given})
    assert str(caught.value) == message


# ---- feature maps ----


def test_elu_plus_one_is_what_it_says():
    x = torch.linspace(-200, 50, 1001, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(elu_plus_one(x), torch.nn.functional.elu(x) + 1)
    (grad,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(grad, torch.where(x > 0, 1.0, x.exp()).detach())
    assert elu_plus_one(torch.tensor([1000.0, -1000.0])).tolist() == [1001.0, 0.0]


def test_random_features_average_to_the_kernel_of_the_softmax():
    # The mean over seeds comes within four standard errors of exp(q · k / √dim), and the spread falls as 1 / m.
    torch.manual_seed(0)
    q, k = (torch.randn(2, 16, 8, dtype=torch.float64) / 2).unbind()
    want = (q * k).sum(-1).div(8**0.5).exp()
    spreads = []
    for num_features in (16, 64):
        maps = [random_features(8, num_features, seed) for seed in range(400)]
        found = torch.stack([(features(q) * features(k)).sum(-1) for features in maps])
        error = found.std(0) / 400**0.5
        assert ((found.mean(0) - want).abs() < 4 * error).all()
        assert (found > 0).all()
        spreads.append((found.std(0) / want).mean())
    assert 1.7 < spreads[0] / spreads[1] < 2.3  # √(64 / 16) = 2


def test_directions_of_random_features_are_orthogonal():
    # |φ(x)| of tiny x gives the directions back: ∂φ_i/∂x' = ω_i φ_i at 0.
    features = random_features(8, 8, 3)
    jacobian = torch.autograd.functional.jacobian(features, torch.zeros(8, dtype=torch.float64))
    directions = jacobian / jacobian.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions @ directions.T, torch.eye(8, dtype=torch.float64))


def test_random_features_through_linear_attention_approach_causal_attention():
    torch.manual_seed(0)
    q, k, v = (t / 2 for t in torch.randn(3, 1, 2, 80, 16).unbind())
    want = regard.attention(q, k, v, mask=regard.masks.causal())
    errors = []
    for num_features in (32, 2048):
        features = random_features(16, num_features, seed=1)
        with_ones = torch.cat((v, torch.ones(1, 2, 80, 1)), -1)
        both, _ = linear_attention(features(q), features(k), with_ones, scale=1.0)
        errors.append(off(both[..., :-1] / both[..., -1:], want.double()))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 3


def test_one_seed_gives_one_map():
    x = torch.randn(5, 8)
    assert torch.equal(random_features(8, 20, 1)(x), random_features(8, 20, 1)(x))
    assert not torch.equal(random_features(8, 20, 1)(x), random_features(8, 20, 2)(x))
    assert random_features(8, 20, 1)(x.bfloat16()).dtype == torch.bfloat16


def test_random_features_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"random_features: num_features must be an int of at least 1; got 0\."):
        random_features(8, 0, 1)
    with pytest.raises(
        ValueError, match=r"^random_features: x must end in dim = 8; got \(3, 7\)\. Make the map for x's"
    ):
        random_features(8, 4, 1)(torch.zeros(3, 7))
