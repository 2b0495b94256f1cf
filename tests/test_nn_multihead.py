"""torch.nn.MultiheadAttention's own cases on ours: results, weights, gradients, masks, layouts, state dicts, errors."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import regard.nn


def pair(*args: object, dtype: torch.dtype = torch.float64, **named: object) -> tuple[nn.Module, nn.Module]:
    """torch's layer and ours with the same numbers."""
    theirs = nn.MultiheadAttention(*args, **named, dtype=dtype)  # pyright: ignore
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = regard.nn.MultiheadAttention(*args, **named, dtype=dtype)  # pyright: ignore
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    return theirs, ours


def inputs(n: int = 7, m: int = 5, batch: int = 3, dims: tuple[int, int, int] = (8, 8, 8)) -> list[Tensor]:
    lengths = (n, m, m)
    return [
        torch.randn(length, batch, dim, dtype=torch.float64, requires_grad=True)
        for length, dim in zip(lengths, dims, strict=True)
    ]


def agree(theirs: nn.Module, ours: nn.Module, qkv: list[Tensor], **named: object) -> None:
    """Outputs, weights, and the gradients of inputs and parameters."""
    found = []
    for layer in (theirs, ours):
        own = [t.detach().clone().requires_grad_() for t in qkv]
        out, weights = layer(*own, **named)
        gradient = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        total = (out * gradient).sum()
        if weights is not None:
            total = total + (weights * weights.detach().cos()).sum()
        wanted = [*own, *layer.parameters()]
        found.append((out, weights, torch.autograd.grad(total, wanted, allow_unused=True)))
    (out, weights, grads), (own_out, own_weights, own_grads) = found
    torch.testing.assert_close(own_out, out)
    assert (own_weights is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(own_weights, weights)
    for own, other in zip(own_grads, grads, strict=True):
        torch.testing.assert_close(own, other)


MASKS = {
    "none": lambda n, m, rows: None,
    "bool": lambda n, m, rows: (torch.rand(n, m) < 0.4).index_fill(1, torch.tensor([0]), False),
    "bool of each head": lambda n, m, rows: (torch.rand(rows, n, m) < 0.4).index_fill(2, torch.tensor([0]), False),
    "float": lambda n, m, rows: torch.randn(n, m, dtype=torch.float64),
    "float of each head": lambda n, m, rows: torch.randn(rows, n, m, dtype=torch.float64),
    "float with -inf": lambda n, m, rows: torch.randn(n, m, dtype=torch.float64).index_fill(
        1, torch.tensor([m - 1]), float("-inf")
    ),
}
PADDINGS = {
    "none": lambda batch, m: None,
    "bool": lambda batch, m: torch.arange(m) >= torch.randint(1, m + 1, (batch, 1)),
    "float": lambda batch, m: torch.randn(batch, m, dtype=torch.float64),
}


@pytest.mark.parametrize(
    ("mask", "padding", "extra"), [*itertools.product(MASKS, PADDINGS, ["", "bias_kv", "zero_attn", "both"])]
)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_it_gives_what_torch_gives(native, mask, padding, extra):
    theirs, ours = pair(8, 2, add_bias_kv=extra in ("bias_kv", "both"), add_zero_attn=extra in ("zero_attn", "both"))
    qkv = inputs()
    named = {"attn_mask": MASKS[mask](7, 5, 3 * 2), "key_padding_mask": PADDINGS[padding](3, 5)}
    for need_weights, average in ((True, True), (True, False), (False, True)):
        agree(theirs, ours, qkv, **named, need_weights=need_weights, average_attn_weights=average)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (5, None), (None, 3), (5, 3)])
def test_keys_and_values_may_have_sizes_of_their_own(native, kdim, vdim, bias):
    theirs, ours = pair(8, 4, kdim=kdim, vdim=vdim, bias=bias)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    agree(theirs, ours, inputs(dims=(8, kdim or 8, vdim or 8)))


@pytest.mark.parametrize("layout", ["sequence first", "batch first", "one sentence"])
@pytest.mark.parametrize("same", ["all", "key and value", "none"])
def test_every_layout_and_every_sharing_of_inputs(native, layout, same):
    theirs, ours = pair(8, 2, batch_first=layout == "batch first")
    q, k, v = inputs(5, 5)
    k, v = (q, q) if same == "all" else (k, k) if same == "key and value" else (k, v)
    if layout == "batch first":
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    if layout == "one sentence":
        q, k, v = (t[:, 0] for t in (q, k, v))
    if same != "none":  # the same object, as self-attention passes it
        k = v = k.detach()
        q = k if same == "all" else q.detach()
    for need_weights in (True, False):
        with torch.no_grad():
            expected, weights = theirs(q, k, v, need_weights=need_weights)
            out, own_weights = ours(q, k, v, need_weights=need_weights)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(own_weights, weights)


@pytest.mark.parametrize("extra", [False, True])
def test_the_causal_hint_gives_what_the_causal_mask_gives(native, extra):
    theirs, ours = pair(8, 2, add_bias_kv=extra, add_zero_attn=extra)
    qkv = inputs(6, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    agree(theirs, ours, qkv, attn_mask=mask, is_causal=not extra, need_weights=False)
    agree(theirs, ours, qkv, attn_mask=mask, is_causal=True, need_weights=True)
    hinted = ours(*qkv, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(hinted, theirs(*qkv, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("named", [{}, {"kdim": 5}, {"add_bias_kv": True}, {"bias": False}])
def test_a_seed_gives_the_numbers_that_it_gives_torch(named):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(8, 2, **named)
    torch.manual_seed(3)
    ours = regard.nn.MultiheadAttention(8, 2, **named)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    theirs.load_state_dict(ours.state_dict())


def test_the_state_dict_of_the_layer_without_torchs_signature_goes_both_ways(native):
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    ours = regard.nn.MultiHeadAttention(8, 2)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_a_row_without_keys_gives_the_bias_of_the_output(native):
    ours = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(1, 3, 8)
    out, weights = ours(x, x, x, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(out, ours.out_proj.bias.expand(1, 3, 8))
    assert weights is not None and not weights.any()


def test_dropout_drops_in_training_alone(native):
    ours = regard.nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(2, 6, 8)
    assert not torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    torch.manual_seed(1)
    first = ours(x, x, x)[0]
    torch.manual_seed(1)
    assert torch.equal(ours(x, x, x)[0], first)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_it_stands_in_torchs_encoder_and_decoder_layers(native, training):
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ]
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    for layer, more in zip(layers, ((), (memory,)), strict=True):
        own = copy.deepcopy(layer)
        calls = 0
        for name in ("self_attn", "multihead_attn"):
            if hasattr(own, name):
                mine = regard.nn.MultiheadAttention(8, 2, batch_first=True)
                mine.load_state_dict(getattr(own, name).state_dict())
                setattr(own, name, mine)
                calls += 1
        named = {"src_key_padding_mask" if not more else "tgt_key_padding_mask": hidden}
        seen = []
        with torch.set_grad_enabled(training), regard.nn.observe(seen.append):
            mine = own.train(training)(x, *more, **named)
            theirs = layer.train(training)(x, *more, **named)
        assert len(seen) == calls
        real = ~hidden[..., None]
        torch.testing.assert_close(torch.where(real, mine, 0.0), torch.where(real, theirs, 0.0))


def test_half_types_and_autocast(native):
    theirs, ours = pair(32, 4, batch_first=True, dtype=torch.float32)
    x = torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x, x, x, need_weights=False)[0]
        expected = theirs(x, x, x, need_weights=False)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("shapes", "named", "words"),
    [
        (((3, 8), (2, 3, 8), (2, 3, 8)), {}, "must all have 3 axes, or 2 for one sentence; got (3, 8)"),
        (((2, 3, 8), (2, 3, 7), (2, 3, 8)), {}, "key must end in 8; got (2, 3, 7)"),
        (((2, 3, 8),) * 3, {"is_causal": True}, "attn_mask must be given with is_causal"),
        (((2, 3, 8),) * 3, {"attn_mask": torch.zeros(3, 4)}, "attn_mask must be (3, 3) or (4, 3, 3); got (3, 4)"),
        (((2, 3, 8),) * 3, {"key_padding_mask": torch.zeros(3, 4)}, "key_padding_mask must be (2, 3); got (3, 4)"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(shapes, named, words):
    layer = regard.nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match="^MultiheadAttention: ") as error:
        layer(*(torch.zeros(shape) for shape in shapes), **named)
    assert words in str(error.value)


def test_a_mask_of_integers_is_refused():
    layer = regard.nn.MultiheadAttention(8, 2)
    x = torch.zeros(3, 1, 8)
    with pytest.raises(TypeError, match="attn_mask must be bool or floating point; got torch.int64"):
        layer(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int64))
