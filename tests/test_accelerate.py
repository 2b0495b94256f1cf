"""PyTorch's own function on our kernels: the same numbers, whoever calls it, and an account of where calls went."""

import gc
import math
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as taken_early

import regard
from agreement import tolerance
from regard.accelerate import Report, _switch, mask_and_bias

INF = math.inf
pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def _off_again():
    yield
    assert not _switch.active
    assert torch.backends.mha.get_fastpath_enabled()


def tensors(*shapes, dtype=torch.float32, gradient=False):
    return [torch.randn(shape).to(dtype).requires_grad_(gradient) for shape in shapes]


def agree(got, want, dtype=torch.float32, length=16):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.stride() == want.stride() or 1 in got.shape or 0 in got.shape
    assert torch.equal(got.isnan(), want.isnan())
    assert not want.isnan().any()
    torch.testing.assert_close(got, want, rtol=0.0, atol=2 * tolerance(dtype, length))


def compared(q, k, v, attn_mask=None, on_regard=1, length=16, **terms):
    """Both results and all gradients agree, and the call ran where it should."""
    inputs = [t for t in (q, k, v, attn_mask) if t is not None]

    def run():
        for t in inputs:
            t.grad = None
        out = taken_early(q, k, v, attn_mask=attn_mask, **terms)
        if out.requires_grad:
            generator = torch.Generator().manual_seed(7)
            out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        return out.detach(), [None if t.grad is None else t.grad.clone() for t in inputs]

    want, want_gradients = run()
    with regard.accelerate() as accelerated:
        got, got_gradients = run()
    report = accelerated.report()
    assert report.on_regard == on_regard, report
    assert sum(report.on_pytorch.values()) == 1 - on_regard, report
    agree(got, want, q.dtype, length)
    for own, theirs in zip(got_gradients, want_gradients, strict=True):
        assert (own is None) == (theirs is None)
        if own is not None:
            assert own.shape == theirs.shape
            assert not own.isnan().any()
            size = max(1.0, float(theirs.double().abs().max()) if theirs.numel() else 1.0)
            torch.testing.assert_close(own, theirs, rtol=0.0, atol=4 * size * tolerance(q.dtype, length))


# ---- the function ----


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 5), (3, 7), (7, 3), (1, 70), (70, 65)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 2)])
def test_every_number_of_axes_gives_what_pytorch_gives(lead, lengths, is_causal, gradient):
    n, m = lengths
    q, k, v = tensors((*lead, n, 8), (*lead, m, 8), (*lead, m, 8), gradient=gradient)
    compared(q, k, v, is_causal=is_causal, length=m)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_gives_what_pytorch_gives(dtype, gradient):
    compared(*tensors((2, 3, 9, 16), (2, 3, 12, 16), (2, 3, 12, 16), dtype=dtype, gradient=gradient), length=12)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float of 0 and -inf", "float"])
@pytest.mark.parametrize(
    "shape",
    [(5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (1, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 5, 7), (2, 1, 1, 7),
     (2, 3, 1, 7), (2, 3, 5, 1), (1, 1, 1, 7)],
)  # fmt: skip
def test_masks_that_broadcast_along_any_axis_give_what_pytorch_gives(shape, kind, gradient):
    allowed = torch.rand(shape) > 0.4
    allowed[..., :1, :] &= shape[-2] == 1  # an empty row, where there are several
    mask = allowed
    if kind != "bool":
        mask = torch.zeros(shape) if kind == "float of 0 and -inf" else torch.randn(shape)
        mask = mask.masked_fill(~allowed, -INF)
    compared(*tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), gradient=gradient), mask)


@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 3)])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("whole", [False, True])
def test_masks_of_other_than_four_axes_give_what_pytorch_gives(lead, kind, whole):
    shape = (*lead, 5, 7) if whole else (*(1 for _ in lead), 5, 7)
    mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape)
    compared(*tensors((*lead, 5, 8), (*lead, 7, 8), (*lead, 7, 8), gradient=True), mask)


@pytest.mark.parametrize("shape", [(5, 7), (1, 3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 1)])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_float_mask_gets_its_gradient(shape, fixed):
    mask = torch.randn(shape)
    mask[..., 0, :] = -INF if shape[-2] > 1 else 0.0
    mask.requires_grad_()
    compared(*tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), gradient=not fixed), mask)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_float32_mask_beside_half_tensors_gives_what_pytorch_gives(gradient):
    shapes = (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)
    compared(*tensors(*shapes, dtype=torch.bfloat16, gradient=gradient), torch.randn(5, 7))


def test_a_mask_expanded_without_memory_is_read_once_along_that_axis():
    mask, bias = mask_and_bias(torch.eye(6, dtype=torch.bool).expand(4, 8, 6, 6))
    assert bias is None
    assert mask is not None and mask.extent() == (1, 1)
    repeated = (torch.rand(4, 1, 1, 6) > 0.5).repeat(1, 8, 1, 1)  # as MultiheadAttention makes it
    repeated[0, :, :, :3] = torch.tensor([True, False, True])
    mask, _ = mask_and_bias(torch.zeros(4, 8, 1, 6).masked_fill(~repeated, -INF))
    assert mask is not None and mask.extent()[1] == 1


def test_a_float_mask_of_nothing_but_0_and_minus_inf_keeps_nan_of_masked_keys_out():
    q, k, v = tensors((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    k[:, :, 3] = v[:, :, 3] = math.nan
    mask = torch.zeros(4, 4)
    mask[:, 3] = -INF
    with regard.accelerate():
        assert not taken_early(q, k, v, attn_mask=mask).isnan().any()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads_give_what_pytorch_gives(gradient, is_causal):
    q, k, v = tensors((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), gradient=gradient)
    compared(q, k, v, enable_gqa=True, is_causal=is_causal)


@pytest.mark.parametrize("gradient", [False, True])
def test_scale_and_a_head_dim_of_the_values_of_its_own_give_what_pytorch_gives(gradient):
    compared(*tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), gradient=gradient), scale=-0.7)


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0)])
def test_lengths_of_zero_give_what_pytorch_gives(lengths):
    n, m = lengths
    compared(*tensors((2, 3, n, 8), (2, 3, m, 8), (2, 3, m, 8)))
    compared(*tensors((3, n, 8), (3, m, 8), (3, m, 8)))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "laid",
    [lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
     lambda t: t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
     lambda t: t.repeat_interleave(2, -1)[..., ::2], lambda t: t.repeat(1, 1, 1, 3)[..., 8:16],
     lambda t: t[:1].expand(2, -1, -1, -1)],
    ids=["heads inside", "batch inside", "every second", "cut out", "expanded"],
)  # fmt: skip
def test_tensors_of_other_strides_give_what_pytorch_gives_laid_out_alike(laid, masked, gradient):
    q, k, v = (laid(t) for t in tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)))
    if gradient and 0 not in q.stride():
        q, k, v = (t.requires_grad_() for t in (q, k, v))
    compared(q, k, v, torch.rand(5, 7) > 0.3 if masked else None)


@pytest.mark.parametrize("gradient", [False, True])
def test_dropout_drops_as_many_weights_and_scales_the_others(gradient):
    q, k = torch.zeros(1, 2, 300, 8), torch.zeros(1, 2, 400, 8)
    v = torch.eye(400).expand(1, 2, 400, 400).clone().requires_grad_(gradient)
    with regard.accelerate() as accelerated:
        torch.manual_seed(3)
        out = taken_early(q, k, v, dropout_p=0.25)
        torch.manual_seed(3)
        assert torch.equal(out, taken_early(q, k, v, dropout_p=0.25))
        assert not torch.equal(out, taken_early(q, k, v, dropout_p=0.25))
    assert accelerated.report().on_regard == 3
    dropped = out == 0.0
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(out[~dropped], torch.full_like(out[~dropped], 1 / 400 / 0.75))
    if gradient:
        out.sum().backward()
        torch.testing.assert_close(v.grad.sum(-1), out.detach().sum(-2) * 400)


def test_a_call_that_needs_no_gradient_and_inference_mode_run_on_regard():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with regard.accelerate() as accelerated, torch.inference_mode():
        out = taken_early(q, k, v)
    assert accelerated.report().on_regard == 1
    agree(out.clone(), taken_early(q, k, v).clone())


def test_autocast_runs_on_regard_in_half_precision():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), gradient=True)
    with regard.accelerate() as accelerated, torch.autocast("cpu", torch.bfloat16):
        out = taken_early(q, k, v)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad.dtype == torch.float32
    assert accelerated.report().on_regard == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", [lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)])
def test_the_kernels_that_compiled_programs_call_lay_everything_out_as_pytorch_does(laid, dtype):
    aten = torch.ops.aten
    q, k, v = (laid(t) for t in tensors((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), dtype=dtype))

    def run():
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=torch.eye(5, 7).to(dtype))
        terms = {"attn_mask": torch.eye(5, 7).to(dtype)}
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return [out, lse, *backward(torch.ones_like(out), q, k, v, out, lse, 0.0, False, **terms)]

    want = run()
    with regard.accelerate() as accelerated:
        got = run()
    assert accelerated.report().on_regard == 1
    for own, theirs in zip(got, want, strict=True):
        assert (own.dtype, own.stride()) == (theirs.dtype, theirs.stride())
        torch.testing.assert_close(own, theirs, rtol=0.0, atol=8 * tolerance(dtype, 7))


# ---- what goes to PyTorch ----


class Own(torch.Tensor):
    pass


REFUSED = {
    "is_causal together with attn_mask": lambda q, k, v: taken_early(
        q, k, v, attn_mask=torch.ones(5, 7, dtype=torch.bool), is_causal=True
    ),
    "a subclass of torch.Tensor": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(
        q[:, :, :, :0].as_subclass(Own), k[:, :, :, :0], v
    ),
    "dropout_p outside 0 to 1": lambda q, k, v: taken_early(q, k, v, dropout_p=1.0),
    "scale of NaN or inf": lambda q, k, v: taken_early(q, k, v[..., :4], scale=math.nan),
    "shapes that PyTorch itself must judge": lambda q, k, v: taken_early(q, k[:, :1], v[:, :1]),
    "forward-mode derivatives": lambda q, k, v: dual(q, k, v),
    "sdpa_kernel names another kernel than flash": lambda q, k, v: by_math(q, k, v),
}


def dual(q, k, v):
    import torch.autograd.forward_ad as forward

    with forward.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return forward.unpack_dual(taken_early(forward.make_dual(q, torch.ones_like(q)), k, v)).tangent


def by_math(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return taken_early(q, k, v)


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")  # PyTorch's own, in forward mode
def test_what_regard_does_not_take_goes_to_pytorch_with_the_same_bits_and_is_explained(why):
    q, k, v = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    want = REFUSED[why](q, k, v)
    with regard.accelerate() as accelerated:
        got = REFUSED[why](q, k, v)
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert accelerated.report() == Report(0, {why: 1})


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda q, k, v: taken_early(q, k, v.double()), RuntimeError),
        (lambda q, k, v: taken_early(q, k[..., :3], v), RuntimeError),
        (lambda q, k, v: taken_early(q, k, v, attn_mask=torch.zeros(5, 7, dtype=torch.int64)), RuntimeError),
        (lambda q, k, v: taken_early(q, k, v, attn_mask=torch.ones(4, 7, dtype=torch.bool)), RuntimeError),
        (lambda q, k, v: taken_early(q, k, v, attn_mask=torch.ones(7)), IndexError),
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_own_words(call, error):
    inputs = tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    with pytest.raises(error) as theirs:
        call(*inputs)
    with regard.accelerate() as accelerated, pytest.raises(error) as ours:
        call(*inputs)
    assert str(ours.value) == str(theirs.value)
    assert accelerated.report().on_regard == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_gives_what_it_gave():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))

    def loss(q):
        return taken_early(q, k, v).sum()

    want = torch.func.grad(loss)(q)
    batched = torch.vmap(taken_early)(q[None], k[None], v[None])
    with regard.accelerate() as accelerated:
        torch.testing.assert_close(torch.func.grad(loss)(q), want)
        torch.testing.assert_close(torch.vmap(taken_early)(q[None], k[None], v[None]), batched)
    assert sum(accelerated.report().on_pytorch.values()) + accelerated.report().on_regard >= 1


def test_other_devices_are_left_alone():
    with regard.accelerate() as accelerated:
        out = taken_early(*(t.to("meta") for t in tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))))
    assert out.is_meta
    assert str(accelerated.report()) == "on regard   0\non PyTorch  0"


def test_the_report_reads_as_a_table():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with regard.accelerate() as accelerated:
        for _ in range(2):
            taken_early(q, k, v)
        taken_early(q, k, v, dropout_p=1.0)
    assert str(accelerated.report()) == "on regard   2\non PyTorch  1\n  1: dropout_p outside 0 to 1"


# ---- who calls ----


def importer():
    from torch.nn.functional import scaled_dot_product_attention

    return lambda *inputs: scaled_dot_product_attention(*inputs)


def test_a_function_that_imported_it_earlier_is_accelerated():
    call = importer()
    with regard.accelerate() as accelerated:
        call(*tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)))
    assert accelerated.report().on_regard == 1


@pytest.mark.parametrize("gradient", [False, True])
def test_a_second_thread_is_accelerated(gradient):
    inputs = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), gradient=gradient)
    found = []

    def work():
        out = taken_early(*inputs)
        if gradient:
            out.sum().backward()
        found.append(out.detach())

    with regard.accelerate() as accelerated:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert accelerated.report().on_regard == 1
    agree(found[0], taken_early(*inputs).detach())


def test_many_threads_and_switching_on_and_off_meanwhile_give_the_same_numbers():
    q, k, v = tensors((1, 2, 33, 8), (1, 2, 33, 8), (1, 2, 33, 8))
    want = taken_early(q, k, v)
    wrong, stop = [], threading.Event()

    def work():
        while not stop.is_set():
            out = taken_early(q, k, v)
            if not torch.allclose(out, want, atol=1e-5):
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with regard.accelerate():
            taken_early(q, k, v)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nested_accelerations_count_each_for_itself():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    with regard.accelerate() as outer:
        taken_early(q, k, v)
        with regard.accelerate() as inner:
            taken_early(q, k, v)
        taken_early(q, k, v)
        with outer:
            taken_early(q, k, v)
        taken_early(q, k, v)
    taken_early(q, k, v)
    assert inner.report().on_regard == 1
    assert outer.report().on_regard == 5


def test_an_error_inside_switches_it_off():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), regard.accelerate() as accelerated:  # noqa: PT012
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    taken_early(q, k, v)
    assert accelerated.report().on_regard == 0
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_it_can_be_started_for_good_and_stopped():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    accelerated = regard.accelerate().start()
    taken_early(q, k, v)
    accelerated.stop()
    taken_early(q, k, v)
    assert accelerated.report().on_regard == 1
    with pytest.raises(
        RuntimeError, match=r"^accelerate: stop must follow start; got no start. Call start\(\) first.$"
    ):
        accelerated.stop()


def test_one_that_nobody_holds_stays_on():
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    regard.accelerate().start()
    gc.collect()
    (accelerated,) = _switch.active
    taken_early(q, k, v)
    assert accelerated.report().on_regard == 1
    accelerated.stop()


def test_afterwards_pytorch_gives_the_same_bits_as_before():
    q, k, v = tensors((1, 2, 50, 8), (1, 2, 50, 8), (1, 2, 50, 8), gradient=True)

    def run():
        out = taken_early(q, k, v, is_causal=True)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    before = run()
    with regard.accelerate():
        run()
    assert all(torch.equal(one, other) for one, other in zip(before, run(), strict=True))


def test_a_forward_inside_may_have_its_backward_outside_and_the_reverse():
    q, k, v = tensors((1, 2, 50, 8), (1, 2, 50, 8), (1, 2, 50, 8), gradient=True)
    want = torch.autograd.grad(taken_early(q, k, v).square().sum(), (q, k, v))
    with regard.accelerate():
        inside = taken_early(q, k, v).square().sum()
    outside = taken_early(q, k, v).square().sum()
    with regard.accelerate():
        back_inside = torch.autograd.grad(outside, (q, k, v))
    for got in (torch.autograd.grad(inside, (q, k, v)), back_inside):
        for own, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


# ---- modules ----


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", ["nothing", "key_padding_mask", "attn_mask", "both", "is_causal"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_gives_what_it_gave(train, masked, need_weights):
    layer = nn.MultiheadAttention(16, 4, batch_first=True).train(train)
    x = torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    future = torch.ones(6, 6).triu(1).bool()
    terms = {
        "nothing": {},
        "key_padding_mask": {"key_padding_mask": padding},
        "attn_mask": {"attn_mask": future},
        "both": {"key_padding_mask": padding, "attn_mask": future},
        "is_causal": {"attn_mask": future, "is_causal": True},
    }[masked]
    with torch.set_grad_enabled(train):
        want, weights = layer(x, x, x, need_weights=need_weights, **terms)
        with regard.accelerate() as accelerated:
            got, own_weights = layer(x, x, x, need_weights=need_weights, **terms)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert (weights is None) == (own_weights is None)
    if weights is not None:
        torch.testing.assert_close(own_weights, weights)
    report = accelerated.report()
    assert report.on_regard == (0 if need_weights else 1)
    assert not report.on_pytorch
    if train:
        one, other = (torch.autograd.grad(out.square().sum(), layer.in_proj_weight)[0] for out in (got, want))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_encoder_gives_what_it_gave_where_there_is_no_padding(train, padded):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).train(train)
    x = torch.randn(2, 6, 16)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = padded
    with torch.set_grad_enabled(train):
        want = encoder(x, src_key_padding_mask=padding)
        with regard.accelerate() as accelerated:
            got = encoder(x, src_key_padding_mask=padding)
    assert accelerated.report().on_regard == 2
    torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-4, atol=1e-5)
    assert not got.isnan().any()


def test_a_scripted_function_is_accelerated():
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(call)
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    want = scripted(q, k, v)
    with regard.accelerate() as accelerated:
        agree(scripted(q, k, v), want)
    assert accelerated.report().on_regard == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("compiled_inside", [False, True])
def test_a_compiled_program_is_accelerated_as_it_runs(compiled_inside, gradient):
    torch.compiler.reset()
    q, k, v = tensors((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), gradient=gradient)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(q, k, v):
        return taken_early(q, k, v, is_causal=True) * 2

    want = taken_early(q, k, v, is_causal=True) * 2
    if compiled_inside:
        with regard.accelerate() as first:
            call(q, k, v)
        assert first.report().on_regard == 1
        assert all(why.startswith("a trace") for why in first.report().on_pytorch)
    else:
        call(q, k, v)
    with regard.accelerate() as accelerated:
        out = call(q, k, v)
        if gradient:
            own = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert accelerated.report() == Report(1, {})
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    if gradient:
        for one, other in zip(own, torch.autograd.grad(want.square().sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    call(q, k, v)
    assert accelerated.report().on_regard == 1


def test_checkpointing_recomputes_on_regard():
    from torch.utils.checkpoint import checkpoint

    q, k, v = tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), gradient=True)
    want = torch.autograd.grad(taken_early(q, k, v).square().sum(), (q, k, v))
    with regard.accelerate() as accelerated:
        out = checkpoint(taken_early, q, k, v, use_reentrant=False)
        got = torch.autograd.grad(out.square().sum(), (q, k, v))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert accelerated.report().on_regard >= 1


def test_a_mode_that_watches_sees_what_it_saw_and_the_kernel_is_regards():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = tensors((1, 2, 64, 8), (1, 2, 64, 8), (1, 2, 64, 8))

    def flops():
        with FlopCounterMode(display=False) as counter:
            taken_early(q, k, v)
        return counter.get_total_flops()

    want = flops()
    with regard.accelerate() as accelerated:
        assert flops() == want
    assert accelerated.report().on_regard == 1


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_a_gradient_may_be_differentiated_once_more(masked):
    # PyTorch's own CPU kernel refuses: its plain formula is the oracle.
    shape = (2, 4, 19, 8)
    q, k, v = tensors(shape, shape, shape, dtype=torch.float64, gradient=True)
    mask = {"bool": torch.rand(19, 19) > 0.3, "float": torch.randn(4, 19, 19).double()}.get(masked)

    def second():
        out = taken_early(q, k, v, attn_mask=mask)
        slopes = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad([t.square().sum() for t in slopes], (q, k, v))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = second()
    with regard.accelerate() as accelerated:
        got = second()
    assert accelerated.report().on_regard == 1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
