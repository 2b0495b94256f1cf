"""`record` on models that transformers does not route: what PyTorch's own functions were given, under module names."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import regard.huggingface
from regard.lens import record


class Attention(nn.Module):
    """As timm writes it."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None, causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(32), "attn": Attention(32, 4)}) for _ in range(3)
        )

    def forward(self, x, mask=None, causal=False):
        for block in self.blocks:
            x = x + block["attn"](block["norm"](x), mask, causal)
        return x


def eager(block, x, mask=None):
    q, k, _ = block["attn"].qkv(block["norm"](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


@pytest.mark.parametrize("masking", ["none", "causal", "bool"])
def test_a_module_of_ones_own_is_recorded_by_name(masking):
    model, x = Blocks().eval(), torch.randn(2, 7, 32)
    mask = {"none": None, "causal": torch.ones(7, 7).tril().bool(), "bool": (torch.rand(2, 1, 7, 7) > 0.4)}[masking]
    if masking == "bool":
        mask[..., 0] = True
    given = {"mask": mask} if masking == "bool" else {"causal": masking == "causal"}
    with torch.no_grad():
        expected = model(x, **given)
        with record(model) as recording:
            out = model(x, **given)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        names = [layer.module for layer in recording.layers]
        assert names == [f"blocks.{n}.attn" for n in range(3)]
        assert [layer.number for layer in recording.layers] == [0, 1, 2]
        for row in range(2):
            found = recording.weights("blocks.0.attn", batch=row, kind="decoder" if masking == "causal" else "self")
            torch.testing.assert_close(found, eager(model.blocks[0], x, mask)[row], rtol=1e-4, atol=1e-5)
        assert torch.equal(model(x, **given), expected)  # PyTorch's own again


def test_multihead_attention_gives_its_weights_and_is_recorded():
    layer, x = nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 6, 32)
    model = nn.ModuleDict({"mixer": layer})
    model.forward = lambda x, **named: model["mixer"](x, x, x, **named)
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    with torch.no_grad():
        for named in ({}, {"average_attn_weights": False}, {"need_weights": False}, {"key_padding_mask": padding}):
            expected, weights = model(x, **named)
            with record(model) as recording:
                out, found = model(x, **named)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            assert (found is None) == (weights is None)
            if weights is not None:
                torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
                own = recording.weights("mixer", batch=1)
                shown = weights[1].mean(0) if weights.dim() == 4 else weights[1]
                torch.testing.assert_close(own.mean(0), shown, rtol=1e-4, atol=1e-5)


def test_an_encoder_and_a_decoder_of_torch_are_recorded():
    model = nn.Transformer(32, 4, 2, 2, 48, batch_first=True).eval()
    source, target = torch.randn(1, 6, 32), torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = model(source, target)
        with record(model) as recording:
            out = model(source, target)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    kinds = {layer.module: layer.kind for layer in recording.layers}
    assert kinds["decoder.layers.1.multihead_attn"] == "cross"
    assert set(kinds) == {
        *(f"encoder.layers.{n}.self_attn" for n in range(2)),
        *(f"decoder.layers.{n}.{part}" for n in range(2) for part in ("self_attn", "multihead_attn")),
    }
    assert recording.weights("decoder.layers.0.multihead_attn", kind="cross").shape == (4, 5, 6)


def test_gradients_flow_through_a_captured_model_and_its_gates():
    model, x = Blocks().eval(), torch.randn(1, 5, 32)
    gate = torch.ones(4, requires_grad=True)
    with record(model), regard.huggingface.intervene(lambda call: call.out * gate[None, :, None, None]):
        model(x).square().mean().backward()
    assert gate.grad.abs().min() > 0
    assert model.blocks[0]["attn"].qkv.weight.grad.abs().sum() > 0


def test_a_module_without_attention_and_unfitting_shapes_are_refused():
    said = "record: the model must run inside the with block; got no attention call."
    with pytest.raises(ValueError, match=said), record(nn.Linear(3, 3)):
        pass

    class Odd(nn.Module):
        def forward(self, q, k):
            return functional.scaled_dot_product_attention(q, k, k)

    with (
        pytest.raises(
            ValueError, match="record: Odd must call scaled_dot_product_attention with q, k and v of one batch"
        ),
        record(odd := Odd()),
    ):
        odd(torch.randn(2, 4, 5, 8), torch.randn(1, 4, 5, 8))
