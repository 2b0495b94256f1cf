"""Positions: their equations, transformers' numbers, offsets, and what they refuse."""

import math

import pytest
import torch
from transformers import LlamaConfig, T5Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from regard.nn import Alibi, Learned, MultiHeadAttention, RelativePosition, Rotary, Sinusoidal
from regard.nn.rotary import Dynamic, Linear, Llama3, YaRN, scaling_as_dict, scaling_from_dict
from regard.positions import Frame

CPU = torch.device("cpu")
BASE = 10_000.0
SCALINGS = [
    (None, {"rope_type": "default"}),
    (Linear(4.0), {"rope_type": "linear", "factor": 4.0}),
    (Dynamic(4.0, 64), {"rope_type": "dynamic", "factor": 4.0}),
    (YaRN(8.0, 32), {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}),
    (
        YaRN(8.0, 32, beta_fast=8.0, beta_slow=2.0, attention_factor=1.5),
        {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 8.0,
            "beta_slow": 2.0, "attention_factor": 1.5,
        },
    ),
    (
        Llama3(8.0, 32),
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "words"), SCALINGS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("seq_len", [9, 150])
def test_rotary_has_the_numbers_of_transformers(scaling, words, seq_len):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters={"rope_theta": BASE, **words}
    )
    theirs = LlamaRotaryEmbedding(config)
    q, k = torch.randn(2, 4, seq_len, 16), torch.randn(2, 2, seq_len, 16)
    cos, sin = theirs(q, torch.arange(seq_len)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    rotary = Rotary(16, base=BASE, scaling=scaling)
    torch.testing.assert_close((rotary.rotate(q), rotary.rotate(k)), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [None, 4])
def test_rotated_products_depend_on_the_distance_alone(interleaved, dim):
    rotary = Rotary(8, interleaved=interleaved, dim=dim)
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    near = rotary.rotate(q, 3) @ rotary.rotate(k, 1).mT
    far = rotary.rotate(q, 1003) @ rotary.rotate(k, 1001).mT
    torch.testing.assert_close(near, far)
    torch.testing.assert_close(rotary.rotate(q).norm(dim=-1), q.norm(dim=-1))
    assert not torch.allclose(near, q @ k.mT)


def test_interleaved_pairs_are_neighbours_as_complex_numbers():
    q = torch.randn(1, 2, 7, 8, dtype=torch.float64)
    angles = torch.arange(7)[:, None] * BASE ** (-torch.arange(0, 8, 2).double() / 8)
    turned = torch.view_as_complex(q.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(Rotary(8, interleaved=True).rotate(q), expected, atol=1e-6, rtol=1e-6)


def test_rows_of_a_batch_may_stand_at_different_places():
    rotary, x = Rotary(8), torch.randn(2, 1, 4, 8)
    together = rotary.rotate(x, torch.tensor([0, 5]))
    torch.testing.assert_close(together[:1], rotary.rotate(x[:1], 0))
    torch.testing.assert_close(together[1:], rotary.rotate(x[1:], 5))
    each = rotary.rotate(x, torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]]))
    torch.testing.assert_close(each, together)


@pytest.mark.parametrize("scaling", [scaling for scaling, _ in SCALINGS if scaling is not None])
def test_a_scaling_survives_a_json_file(scaling):
    assert scaling_from_dict(scaling_as_dict(scaling)) == scaling


def test_rotary_refuses_in_words():
    with pytest.raises(ValueError, match="Rotary: dim must be even and at most head_dim = 8; got 9"):
        Rotary(8, dim=9)
    with pytest.raises(ValueError, match="Rotary: scaling's kind must be one of linear, .*; got 'longrope'"):
        Rotary(8, scaling={"kind": "longrope"})
    with pytest.raises(ValueError, match="Rotary: scaling must have the numbers of 'yarn'; got factor"):
        Rotary(8, scaling={"kind": "yarn", "factor": 2.0})


@pytest.mark.parametrize("dim", [6, 7])
def test_sinusoids_are_the_papers(dim):
    table = Sinusoidal(dim).add(torch.zeros(1, 5, dim, dtype=torch.float64), offset=3)[0]
    for p in range(5):
        for i in range(dim):
            angle = (p + 3) / 10_000 ** ((i - i % 2) / dim)
            assert table[p, i] == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-12)


@pytest.mark.parametrize("dim", [6, 7])
def test_sinusoids_in_halves_are_marians(dim):
    theirs = MarianSinusoidalPositionalEmbedding(9, dim)
    own = Sinusoidal(dim, halves=True).add(torch.zeros(1, 9, dim))[0]
    torch.testing.assert_close(own, theirs.create_weight(), atol=1e-6, rtol=0)


def test_learned_positions_are_looked_up_where_the_tokens_stand():
    learned, x = Learned(10, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(learned.add(x, 5), x + learned.weight[5:8])
    at = torch.tensor([[0, 1, 2], [7, 8, 9]])
    torch.testing.assert_close(learned.add(x, at), x + learned.weight[at])
    torch.testing.assert_close(learned.add(x, torch.tensor([0, 7])), x + learned.weight[at])
    with pytest.raises(ValueError, match="positions must lie within 0 and max_length - 1 = 9; got 8 to 10"):
        learned.add(x, 8)
    with pytest.raises(ValueError, match="got 0 to 10"):
        learned.add(x, torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"x must be \(batch, seq_len, dim = 4\); got \(2, 3, 5\)"):
        learned.add(torch.zeros(2, 3, 5))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_are_t5s(bidirectional):
    distances = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, 32, 128)
    own = RelativePosition(2, bidirectional=bidirectional)
    assert torch.equal(own.bucket(distances), expected)


def test_the_relative_bias_is_t5s_and_its_table_learns(native):
    config = T5Config(d_model=8, d_kv=4, num_heads=2, relative_attention_num_buckets=8)
    theirs = T5Attention(config, has_relative_attention_bias=True)
    own = RelativePosition(2, num_buckets=8)
    with torch.no_grad():
        own.weight.copy_(theirs.relative_attention_bias.weight.T.normal_())
    expected = theirs.compute_bias(5, 7)
    diagonal = own.bias().resolve(Frame(1, 2, 5, 7), torch.float32, CPU)[1]
    assert diagonal is not None
    for i in range(5):
        torch.testing.assert_close(diagonal[0, :, 4 - i : 11 - i], expected[0, :, i])
    layer = MultiHeadAttention(8, 2)
    layer(torch.randn(2, 6, 8), positions=own).sum().backward()
    assert own.weight.grad is not None and bool(own.weight.grad.any())


def test_relative_positions_refuse_a_reach_below_their_buckets():
    with pytest.raises(ValueError, match="max_distance must be above 8, the distances with a bucket each; got 8"):
        RelativePosition(2, max_distance=8)


def test_alibi_lowers_scores_by_the_distance(native):
    layer, x = MultiHeadAttention(16, 4), torch.randn(1, 6, 16)
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    slopes = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(4)])
    dense = -slopes[None, :, None, None] * distance
    torch.testing.assert_close(layer(x, positions=Alibi()), layer(x, bias=dense))
    assert not torch.allclose(layer(x, positions=Alibi()), layer(x))
    torch.testing.assert_close(layer(x, positions=Alibi(slopes)), layer(x, bias=dense))
