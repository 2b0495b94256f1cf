"""Blocks and stacks against torch's, checkpoints, packing; writing token by token and by beams against brute force."""

import itertools

import pytest
import torch
from torch import nn

from regard import KVCache, masks
from regard.nn import Block, Decoder, Encoder, MultiHeadAttention, Packing, SwiGLU, beam_search, generate
from regard.nn.generate import pick


def feed_forward(dim=8, hidden=16):
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def encoder(norm_first=True, layers=2):
    blocks = [Block(8, MultiHeadAttention(8, 2), feed_forward(), norm_first=norm_first) for _ in range(layers)]
    return Encoder(blocks, nn.LayerNorm(8) if norm_first else None)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_block_is_torchs_layer(native, norm_first, side):
    make = nn.TransformerEncoderLayer if side == "encoder" else nn.TransformerDecoderLayer
    theirs = make(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    cross = MultiHeadAttention(8, 2) if side == "decoder" else None
    ours = Block(8, MultiHeadAttention(8, 2), feed_forward(), cross=cross, norm_first=norm_first).double()
    names = {
        "attention": "self_attn",
        "attention_norm": "norm1",
        "feed_forward.0": "linear1",
        "feed_forward.2": "linear2",
    }
    names |= {"feed_forward_norm": "norm2"} if cross is None else {
        "cross": "multihead_attn", "cross_norm": "norm2", "feed_forward_norm": "norm3"
    }  # fmt: skip
    for own, other in names.items():
        ours.get_submodule(own).load_state_dict(theirs.get_submodule(other).state_dict())
    x, memory = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    hidden = ~torch.ones(5, 5, dtype=torch.bool).tril()
    if cross is None:
        expected, out = theirs(x, src_mask=hidden), ours(x, mask=masks.causal())
    else:
        past = torch.tensor([[False] * 4, [False, False, True, True]])
        expected = theirs(x, memory, tgt_mask=hidden, memory_key_padding_mask=past)
        out = ours(x, memory, mask=masks.causal(), memory_mask=masks.padding([4, 2]))
    torch.testing.assert_close(out, expected)


def test_swiglu_is_the_formula():
    layer, x = SwiGLU(6, 10, bias=True), torch.randn(2, 3, 6)
    gate, up = nn.functional.linear(x, layer.up.weight, layer.up.bias).split(10, -1)
    expected = nn.functional.linear(gate * gate.sigmoid() * up, layer.down.weight, layer.down.bias)
    torch.testing.assert_close(layer(x), expected)


def test_checkpoints_change_no_gradient_and_are_used(native):
    stack, x = encoder(), torch.randn(2, 5, 8)
    calls = []
    stack.blocks[0].feed_forward.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for wanted in (False, True):
        stack.zero_grad()
        stack.checkpoint = wanted
        calls.clear()
        stack(x, mask=masks.causal()).square().sum().backward()
        found.append(([p.grad.clone() for p in stack.parameters()], len(calls)))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1], found[1][1]) == (1, 2)


@pytest.mark.parametrize("form", [{}, {"num_kv_heads": 1}])
def test_a_decoder_reads_a_memory_that_was_projected_once(native, form):
    blocks = [
        Block(8, MultiHeadAttention(8, 2, **form), feed_forward(), cross=MultiHeadAttention(8, 2, **form))
        for _ in range(2)
    ]
    decoder, x, memory = Decoder(blocks), torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    with torch.no_grad():
        whole = decoder(x, memory, mask=masks.causal(), memory_mask=masks.padding([4, 3]))
        caches = [KVCache(), KVCache()]
        kept = decoder.project_memory(memory)
        parts = [
            decoder(part, kept, mask=masks.causal(), memory_mask=masks.padding([4, 3]), caches=caches)
            for part in x.split([2, 1, 2], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_block_with_cross_attention_wants_a_memory():
    block = Block(8, MultiHeadAttention(8, 2), feed_forward(), cross=MultiHeadAttention(8, 2))
    with pytest.raises(ValueError, match="Block: memory must be given to a block with cross-attention; got None"):
        block(torch.zeros(1, 2, 8))


# ---- packing ----


@pytest.mark.parametrize("lengths", [[5, 2, 4], [1, 1, 1], [0, 3, 5]])
@pytest.mark.parametrize("causal", [False, True])
def test_a_packed_row_gives_what_the_padded_batch_gives(native, lengths, causal):
    stack, x = encoder().double(), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor(lengths)
    packing = Packing(sizes, 5)
    mask = masks.padding(sizes) & masks.causal() if causal else masks.padding(sizes)
    own = masks.causal() & packing.mask() if causal else packing.mask()
    keep = (torch.arange(5) < sizes[:, None])[..., None]
    gradient = torch.randn(3, 5, 8, dtype=torch.float64)
    padded = torch.where(keep, stack(x, mask=mask), 0.0)
    packed = packing.unpack(stack(packing.pack(x), mask=own))
    torch.testing.assert_close(packed, padded)
    grads = [torch.autograd.grad((out * gradient).sum(), x)[0] for out in (packed, padded)]
    torch.testing.assert_close(grads[0], grads[1])
    filled = Packing(sizes, 5, multiple=8)
    assert filled.pack(x).shape[1] == 8 * -(-sum(lengths) // 8)
    again = filled.unpack(stack(filled.pack(x), mask=masks.causal() & filled.mask() if causal else filled.mask()))
    torch.testing.assert_close(again, padded)
    assert filled.pack_wanted(torch.ones(3, 5)).sum() == sum(lengths) - 100 * (-sum(lengths) % 8)
    assert packing.positions.tolist() == [[i for length in lengths for i in range(length)]]


def test_a_packed_row_looks_at_its_own_memory_alone(native):
    layer = MultiHeadAttention(8, 2).double()
    x, memory = torch.randn(3, 4, 8, dtype=torch.float64), torch.randn(3, 6, 8, dtype=torch.float64)
    q, kv = Packing(torch.tensor([4, 1, 2]), 4), Packing(torch.tensor([3, 6, 1]), 6)
    packed = q.unpack(layer(q.pack(x), kv.pack(memory), mask=q.mask_onto(kv)))
    padded = layer(x, memory, mask=masks.padding([3, 6, 1]))
    torch.testing.assert_close(packed, torch.where(q.keep[..., None], padded, 0.0))


def test_lengths_beyond_the_rows_are_refused():
    with pytest.raises(ValueError, match="Packing: lengths must be .* from 0 to seq_len = 3; got .*4"):
        Packing(torch.tensor([2, 4]), 3)


# ---- writing ----


class Table:
    """p(next | last token) from a table: small enough to try every text."""

    def __init__(self, table, rows=None):
        self.table, self.steps, self.rows = table, 0, rows

    def step(self, tokens):
        self.steps += 1
        if self.rows is not None:
            assert len(tokens) == len(self.rows)
        return self.table[tokens[:, -1]]

    def select(self, rows):
        if self.rows is not None:
            self.rows = self.rows[rows]


def test_greedy_takes_the_likeliest_and_ended_rows_leave():
    table = torch.full((5, 5), -9.0)
    for last, following in ((1, 2), (2, 3), (3, 0), (4, 4)):
        table[last, following] = 5.0
    decoding = Table(table, torch.arange(3))
    out = generate(decoding, torch.tensor([[1], [3], [4]]), max_new_tokens=4, end=0)
    assert out.tokens.tolist() == [[2, 3, 0, 0], [0, 0, 0, 0], [4, 4, 4, 4]]
    assert out.lengths.tolist() == [3, 1, 4]
    assert decoding.rows.tolist() == [2]
    expected = table.log_softmax(-1)
    torch.testing.assert_close(out.log_probs[0], expected[1, 2] + expected[2, 3] + expected[3, 0])


def test_all_rows_ended_ends_the_writing():
    table = torch.eye(3).roll(-1, 1) * 9  # 1 -> 0
    decoding = Table(table)
    generate(decoding, torch.tensor([[1], [1]]), max_new_tokens=50, end=0)
    assert decoding.steps == 1


def test_draws_follow_temperature_top_k_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**named):
        return pick(logits, generator=generator, **named).bincount(minlength=4) / len(logits)

    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.02, rtol=0)
    first_two = logits[0, :2].softmax(-1)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2)[:2], first_two, atol=0.02, rtol=0)
    assert not shares(temperature=1.0, top_k=2)[2:].any()
    # 0.64 + 0.24 hold 0.85, 0.64 alone does not
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.85)[:2], first_two, atol=0.02, rtol=0)
    assert not shares(temperature=1.0, top_p=0.85)[2:].any()
    assert shares(temperature=1.0, top_p=0.5)[0] == 1.0
    assert shares()[0] == 1.0


def test_a_generator_with_the_same_seed_writes_the_same():
    table = torch.randn(6, 6)
    written = [
        generate(
            Table(table), torch.tensor([[1]]), max_new_tokens=20, temperature=1.0,
            generator=torch.Generator().manual_seed(5),
        ).tokens
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*written)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("longest", [1, 3, 4])
def test_wide_beams_find_the_best_text_of_all(length_penalty, longest):
    vocab, end = 8, 0
    table = torch.randn(vocab, vocab) * 2
    table[:, 4:] = -torch.inf  # four tokens that are ever written, so that four beams of each length miss nothing
    log_probs = table.log_softmax(-1)
    texts = []
    for length in range(1, longest + 1):
        for text in itertools.product(range(4), repeat=length):
            if end in text[:-1] or (text[-1] != end and length < longest):
                continue
            score = sum(log_probs[a, b] for a, b in itertools.pairwise((1, *text))) / length**length_penalty
            texts.append((float(score), list(text)))
    best = max(texts)

    class Wide(Table):
        def step(self, tokens):
            wide = super().step(tokens % vocab)  # beams that are out of the race may hold any token
            return torch.cat((wide, wide.new_full((len(wide), 200), -torch.inf)), -1)

    out = beam_search(
        Wide(table), torch.tensor([[1], [1]]), num_beams=64, max_new_tokens=longest, end=end,
        length_penalty=length_penalty,
    )  # fmt: skip
    for row in range(2):
        assert out.tokens[row, 0, : out.lengths[row, 0]].tolist() == best[1]
        assert float(out.scores[row, 0]) == pytest.approx(best[0], abs=1e-5)
    held = out.scores[0][out.scores[0].isfinite()]
    assert len(held) > 1
    assert bool((held.diff() <= 0).all())


def test_one_beam_without_penalty_is_greedy_unless_an_end_wins():
    table = torch.randn(6, 6)
    table[:, 0] = -20.0
    beams = beam_search(Table(table), torch.tensor([[1]]), num_beams=1, max_new_tokens=5, end=0, length_penalty=0.0)
    greedy = generate(Table(table), torch.tensor([[1]]), max_new_tokens=5, end=0)
    assert torch.equal(beams.tokens[0], greedy.tokens)
    torch.testing.assert_close(beams.scores[0], greedy.log_probs)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an int of at least 1; got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite; got -1.0"),
        ({"top_k": 0}, "top_k must be an int of at least 1; got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
    ],
)
def test_numbers_that_say_nothing_are_refused(named, words):
    with pytest.raises(ValueError, match=f"^generate: {words}"):
        generate(Table(torch.zeros(3, 3)), torch.tensor([[1]]), **{"max_new_tokens": 2, **named})


def test_no_first_token_and_too_many_beams_are_refused():
    with pytest.raises(ValueError, match=r"generate: tokens must be int64 \(batch, seq_len\), at least one a row"):
        generate(Table(torch.zeros(3, 3)), torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=2)
    with pytest.raises(ValueError, match="num_beams must be at most half the vocabulary, 1; got 2"):
        beam_search(Table(torch.zeros(3, 3)), torch.tensor([[1]]), num_beams=2, max_new_tokens=2, end=0)


def test_a_cache_goes_on_with_chosen_rows():
    cache, k = KVCache(), torch.randn(3, 2, 4, 5)
    cache.append(k, k + 1)
    cache.reorder(torch.tensor([2, 2, 0, 1]))
    assert torch.equal(cache.keys, k[[2, 2, 0, 1]])
    assert torch.equal(cache.values, k[[2, 2, 0, 1]] + 1)
    new = torch.randn(4, 2, 1, 5)
    cache.append(new, new)
    assert (cache.position, cache.key_offset, len(cache)) == (5, 0, 5)
    empty = KVCache()
    empty.reorder(torch.tensor([0]))
    assert len(empty) == 0
