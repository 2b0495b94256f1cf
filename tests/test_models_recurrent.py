"""The recurrent encoder-decoder against its equations, step by step; and its alignment."""

import pytest
import torch
from torch.nn.functional import linear

from regard.models import RecurrentSeq2Seq


def gru_step(rnn, x, h):
    """Cho et al. 2014, as torch writes it: one step of one layer."""
    r, z, n = linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0).chunk(3, -1)
    own_r, own_z, own_n = linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0).chunk(3, -1)
    z = torch.sigmoid(z + own_z)
    return (1 - z) * torch.tanh(n + torch.sigmoid(r + own_r) * own_n) + z * h


@pytest.mark.parametrize("kind", ["none", "bahdanau", "luong"])
def test_it_is_its_equations(native, kind):
    model = RecurrentSeq2Seq(30, 20, dim=8, hidden=12, attention=kind).double().eval()
    source, target = torch.randint(3, 30, (2, 6)), torch.randint(3, 20, (2, 4))
    h, last = model.encoder(model.source_embedding(source))
    s = torch.tanh(model.begin(torch.cat((last[0], last[1]), -1)))
    vector = None if kind != "none" else torch.tanh(model.context(torch.cat((last[0], last[1]), -1)))
    read = torch.cat((torch.full((2, 1), model.start_token), target[:, :-1]), 1)
    logits, weights = [], []
    for i in range(4):
        y = model.target_embedding(read[:, i])
        if kind == "luong":
            s = gru_step(model.decoder, y, s)
            weight = (model.query(s)[:, None] @ h.mT)[:, 0].softmax(-1)
        elif kind == "bahdanau":
            scores = torch.tanh(model.query(s)[:, None] + model.key(h)) @ model.score_weight
            weight = scores.softmax(-1)
        c = vector if kind == "none" else (weight[:, None] @ h)[:, 0]
        if kind != "luong":
            s = gru_step(model.decoder, torch.cat((y, c), -1), s)
        if kind != "none":
            weights.append(weight)
        logits.append(model.head(torch.tanh(model.readout(torch.cat((s, c), -1)))))
    torch.testing.assert_close(model(source, target), torch.stack(logits, 1))
    if kind != "none":
        torch.testing.assert_close(model.alignment(source, target), torch.stack(weights, 1))


@pytest.mark.parametrize("kind", ["bahdanau", "luong"])
def test_an_alignment_leaves_padding_out(native, kind):
    model = RecurrentSeq2Seq(30, 20, dim=8, hidden=12, attention=kind)
    source, target = torch.randint(3, 30, (2, 6)), torch.randint(3, 20, (2, 4))
    weights = model.alignment(source, target, torch.tensor([6, 2]))
    assert weights.shape == (2, 4, 6)
    assert not weights[1, :, 2:].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_one_vector_has_no_alignment():
    model = RecurrentSeq2Seq(30, attention="none", dim=8, hidden=12)
    with pytest.raises(ValueError, match="attention must be 'bahdanau' or 'luong'; got 'none'"):
        model.alignment(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["bahdanau", "luong"])
def test_gradients_reach_every_number(native, kind):
    model = RecurrentSeq2Seq(30, 20, dim=8, hidden=12, attention=kind, cell="lstm", num_layers=2)
    source, target = torch.randint(3, 30, (2, 6)), torch.randint(3, 20, (2, 4))
    model.loss(source, target, torch.tensor([6, 3]), torch.tensor([4, 2])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
