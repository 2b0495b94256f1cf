"""Language models, encoders and translators: masks hold, caches agree, losses are what they say, and they learn."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from regard import masks
from regard.models import BERT, GPT, RecurrentSeq2Seq, Seq2Seq, Transformer
from regard.models.transformer import POSITIONS, check_tokens, count_parameters
from regard.nn import observe

SMALL = {"dim": 16, "num_heads": 4, "num_layers": 2}
FORMS = {
    **{f"{kind} positions": {"positions": kind} for kind in POSITIONS},
    "llama": {"norm": "rms", "activation": "swiglu", "bias": False, "num_kv_heads": 2, "positions": "rotary"},
    "norms last": {"norm_first": False, "positions": "learned"},
    "untied": {"tied": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_token_sees_none_that_follow(native, form):
    model = GPT(30, **SMALL, **FORMS[form]).eval()
    tokens = torch.randint(30, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 30
    with torch.no_grad():
        one, other = model(tokens), model(changed)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.allclose(one[:, 5:], other[:, 5:])


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("form", FORMS)
def test_writing_with_caches_is_writing_without(native, form, window):
    model = GPT(30, window=window, **SMALL, **FORMS[form]).eval()
    lengths = torch.tensor([6, 1, 4])
    prompt = torch.randint(30, (3, 6))
    out = model.generate(prompt, lengths=lengths, max_new_tokens=5)
    for row, length in enumerate(lengths.tolist()):
        text = prompt[row : row + 1, :length]
        for _ in range(5):
            with torch.no_grad():
                text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
        assert torch.equal(out.tokens[row], text[0, length:])


def test_the_loss_of_a_language_model_counts_real_tokens_alone(native):
    model = GPT(30, **SMALL)
    tokens = torch.randint(30, (2, 7))
    tokens[1, 4:] = -100
    loss = model.loss(tokens)
    logits = [model(tokens[:1, :-1])[0], model(tokens[1:, :3])[0]]
    expected = cross_entropy(torch.cat(logits), torch.cat((tokens[0, 1:], tokens[1, 1:4])))
    torch.testing.assert_close(loss, expected)


def test_documents_packed_in_a_row_do_not_meet(native):
    model = GPT(30, **SMALL).eval()
    one, other = torch.randint(30, (1, 4)), torch.randint(30, (1, 5))
    ids = torch.tensor([[0] * 4 + [1] * 5])
    together = model(torch.cat((one, other), 1), mask=masks.documents(ids))
    torch.testing.assert_close(together, torch.cat((model(one), model(other)), 1))


@pytest.mark.parametrize("form", ["rotary positions", "sinusoidal positions", "relative positions", "norms last"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_translators_packed_loss_is_the_padded_one(native, form, shared):
    named = {**FORMS[form], "positions": FORMS[form].get("positions", "learned")}
    model = Seq2Seq(30, None if shared else 20, embedding_norm=True, head_bias=True, **SMALL, **named).double()
    source, target = torch.randint(3, 30, (3, 7)), torch.randint(3, 20, (3, 5))
    from_lengths, to_lengths = torch.tensor([7, 1, 4]), torch.tensor([5, 3, 1])
    keep = torch.arange(5) < to_lengths[:, None]
    logits = model(source, target, from_lengths, to_lengths)
    expected = cross_entropy(logits[keep], target[keep], label_smoothing=0.1)
    loss = model.loss(source, target, from_lengths, to_lengths, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)
    wanted = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, wanted, allow_unused=True), torch.autograd.grad(expected, wanted, allow_unused=True)
    )


TRANSLATORS = {
    "transformer": lambda: Seq2Seq(30, 20, **SMALL),
    "transformer with tables of numbers": lambda: Seq2Seq(30, 20, positions="relative", **SMALL),
    **{
        f"{cell}, {attention}": lambda cell=cell, attention=attention: RecurrentSeq2Seq(
            30, 20, dim=8, hidden=16, cell=cell, attention=attention, num_layers=2
        )
        for cell in ("gru", "lstm")
        for attention in ("none", "bahdanau", "luong")
    },
}


@pytest.mark.parametrize("name", TRANSLATORS)
def test_padding_changes_no_sentence(native, name):
    model = TRANSLATORS[name]().eval()
    source, target = torch.randint(3, 30, (3, 7)), torch.randint(3, 20, (3, 5))
    lengths = torch.tensor([7, 2, 5])
    together = model(source, target, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(source[row : row + 1, :length], target[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("name", TRANSLATORS)
def test_a_target_token_sees_none_that_follow(native, name):
    model = TRANSLATORS[name]().eval()
    source, target = torch.randint(3, 30, (2, 7)), torch.randint(3, 20, (2, 5))
    changed = target.clone()
    changed[:, 2:] = (changed[:, 2:] + 1) % 20
    one, other = model(source, target), model(source, changed)
    torch.testing.assert_close(one[:, :3], other[:, :3])  # token 2 is written before it is read
    assert not torch.allclose(one[:, 3:], other[:, 3:])


@pytest.mark.parametrize("name", TRANSLATORS)
def test_translating_step_by_step_is_translating_at_once(native, name):
    model = TRANSLATORS[name]().eval()
    source, lengths = torch.randint(3, 30, (4, 7)), torch.tensor([7, 2, 5, 1])
    out = model.generate(source, lengths, max_new_tokens=6)
    with torch.no_grad():
        logits = model(source, out.tokens, lengths)
    for row, length in enumerate(out.lengths.tolist()):
        assert torch.equal(logits[row, :length].argmax(-1), out.tokens[row, :length])
    torch.testing.assert_close(
        out.log_probs,
        torch.stack([
            logits[row, :length].log_softmax(-1).gather(-1, out.tokens[row, :length, None]).sum()
            for row, length in enumerate(out.lengths.tolist())
        ]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["transformer", "lstm, bahdanau", "gru, luong", "gru, none"])
def test_beams_score_what_the_model_scores(native, name):
    model = TRANSLATORS[name]().eval()
    source, lengths = torch.randint(3, 30, (3, 7)), torch.tensor([7, 2, 5])
    out = model.beam_search(source, lengths, num_beams=4, max_new_tokens=5)
    greedy = model.generate(source, lengths, max_new_tokens=5)
    for row in range(3):
        for beam in range(4):
            length = int(out.lengths[row, beam])
            text = out.tokens[row, beam, :length]
            with torch.no_grad():
                logits = model(source[row : row + 1, : lengths[row]], text[None])[0].log_softmax(-1)
            score = logits.gather(-1, text[:, None]).sum() / length
            torch.testing.assert_close(out.scores[row, beam], score, atol=1e-4, rtol=1e-4)
        assert out.scores[row, 0] >= greedy.log_probs[row] / greedy.lengths[row] - 1e-4


def test_a_bert_sees_both_ways_and_no_padding(native):
    model = BERT(30, **SMALL).eval()
    tokens, lengths = torch.randint(30, (2, 6)), torch.tensor([6, 3])
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 30
    one, other = model(tokens, lengths), model(changed, lengths)
    assert not torch.allclose(one[0, 0], other[0, 0])
    assert torch.equal(one[1, :3], other[1, :3])


def test_the_losses_of_a_bert_are_those_of_its_logits(native):
    tokens, lengths = torch.randint(30, (3, 6)), torch.tensor([6, 3, 5])
    wanted = torch.full((3, 6), -100)
    wanted[0, 2], wanted[1, 1] = 7, 9
    model = BERT(30, **SMALL)
    torch.testing.assert_close(
        model.loss(tokens, wanted, lengths), cross_entropy(model(tokens, lengths).flatten(0, 1), wanted.flatten())
    )
    tagger = model.with_head("tag", 10)
    torch.testing.assert_close(
        tagger.loss(tokens, wanted, lengths), cross_entropy(tagger(tokens, lengths).flatten(0, 1), wanted.flatten())
    )
    classifier = model.with_head("classify", 4)
    classes = torch.tensor([0, 3, 1])
    torch.testing.assert_close(
        classifier.loss(tokens, classes, lengths), cross_entropy(classifier(tokens, lengths), classes)
    )
    spans, ends = model.with_head("span"), torch.tensor([[1, 4], [0, 2], [3, 3]])
    logits = spans(tokens, lengths)
    expected = torch.stack([
        cross_entropy(logits[row, :length, side], ends[row, side])
        for row, length in enumerate(lengths.tolist())
        for side in (0, 1)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(spans.loss(tokens, ends, lengths), expected)
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(spans.transformer.state_dict()[name], value)


def trained(model, batch, steps=60, autocast=False):
    """Mean loss of the first and the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = batch(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[:3]) / 3, sum(losses[-3:]) / 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["transformer", "gru, bahdanau", "lstm, luong", "gru, none"])
def test_a_translator_learns_to_copy(native, name, autocast):
    model = TRANSLATORS[name]()
    generator = torch.Generator().manual_seed(0)

    def batch(model):
        source = torch.randint(3, 9, (16, 4), generator=generator)
        lengths = torch.randint(2, 5, (16,), generator=generator)
        return model.loss(source, source, lengths, lengths)

    first, last = trained(model, batch, 100, autocast)
    assert last < 0.75 * first, (first, last)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_language_model_learns_to_count(native, autocast, checkpoint):
    model = GPT(12, dropout=0.05, **SMALL)
    model.transformer.checkpoint = checkpoint

    def batch(model):
        return model.loss((torch.randint(12, (8, 1)) + torch.arange(9)) % 12)

    first, last = trained(model, batch, 80, autocast)
    assert last < 0.2 * first, (first, last)


def test_checkpoints_change_no_gradient_whatever_the_dropout(native):
    model, tokens = GPT(12, dropout=0.3, attention_dropout=0.3, **SMALL), torch.randint(12, (2, 9))
    found = []
    for wanted in (False, True):
        model.zero_grad()
        model.transformer.checkpoint = wanted
        assert model.transformer.checkpoint is wanted
        torch.manual_seed(4)
        model.loss(tokens).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_every_attention_of_a_model_can_be_watched(native):
    model, calls = Seq2Seq(30, **SMALL).eval(), []
    with torch.no_grad(), observe(calls.append, model):
        model(torch.randint(30, (1, 5)), torch.randint(30, (1, 4)))
    assert [(call.name, call.is_cross, tuple(call.q.shape[2:3] + call.k.shape[2:3])) for call in calls] == [
        ("encoder.stack.blocks.0.attention", False, (5, 5)),
        ("encoder.stack.blocks.1.attention", False, (5, 5)),
        ("decoder.stack.blocks.0.attention", False, (4, 4)),
        ("decoder.stack.blocks.0.cross", True, (4, 5)),
        ("decoder.stack.blocks.1.attention", False, (4, 4)),
        ("decoder.stack.blocks.1.cross", True, (4, 5)),
    ]
    assert [call.layer_index for call in calls] == [0, 1, 0, 0, 1, 1]


def test_words_that_are_not_known_are_refused():
    for named, words in (
        ({"activation": "tanh"}, "activation must be one of gelu, .*; got 'tanh'"),
        ({"norm": "batch"}, "norm must be one of layer, rms; got 'batch'"),
        ({"positions": "polar"}, "positions must be one of none, .*; got 'polar'"),
        ({"positions": "learned", "position_options": {"base": 2.0}}, "position_options must be empty for .*'learned'"),
    ):
        with pytest.raises(ValueError, match=f"^Transformer: {words}"):
            Transformer(**SMALL, **named)
    with pytest.raises(ValueError, match="Transformer: memory must be given where cross=True; got None"):
        Transformer(**SMALL, cross=True)(torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="BERT: head must be one of masked, classify, tag, span; got 'rank'"):
        BERT(30, head="rank", **SMALL)
    with pytest.raises(ValueError, match="RecurrentSeq2Seq: cell must be one of gru, lstm; got 'rnn'"):
        RecurrentSeq2Seq(30, cell="rnn")
    with pytest.raises(ValueError, match="RecurrentSeq2Seq: hidden must be even, half for each direction; got 7"):
        RecurrentSeq2Seq(30, hidden=7)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="GPT: tokens must be from 0 to vocab_size - 1 = 29; got 3 to 30"):
        GPT(30, **SMALL)(torch.tensor([[3, 30]]))
    with pytest.raises(ValueError, match=r"here: ids must be int64 \(batch, seq_len\); got torch.float32 \(2,\)"):
        check_tokens("here", "ids", torch.zeros(2), 3)
    with pytest.raises(ValueError, match=r"GPT.generate: lengths must be \(batch,\) = \(1,\), each from 1 to 2"):
        GPT(30, **SMALL).generate(torch.tensor([[3, 4]]), lengths=torch.tensor([0]), max_new_tokens=1)


def test_parameters_are_counted():
    assert count_parameters(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))) == 8 + 3
