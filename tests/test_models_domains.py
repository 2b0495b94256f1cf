"""The domains: an embedding and a mask each, and the same Transformer after it."""

import pytest
import torch

from regard.models import Classifier, Columns, Frames, Patches, Points, Seq2Seq, ViT

SMALL = {"dim": 16, "num_heads": 4, "num_layers": 2}


def test_patches_are_the_squares_of_the_image():
    layer = Patches(6, image_size=8, patch=4, channels=2)
    images = torch.randn(3, 2, 8, 8)
    x = layer(images).x
    squares = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # row by row
    expected = squares.flatten(1, 2) @ layer.projection.weight.flatten(1).T + layer.projection.bias
    torch.testing.assert_close(x[:, 1:], expected)
    torch.testing.assert_close(x[:, 0], layer.first[0].expand(3, -1))
    with pytest.raises(ValueError, match=r"images must be \(batch, 2, 8, 8\); got \(3, 2, 9, 8\)"):
        layer(torch.zeros(3, 2, 9, 8))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch; got 8 and 3"):
        Patches(6, image_size=8, patch=3)


@pytest.mark.parametrize("length", [1, 2, 9, 12])
def test_frames_past_the_end_change_nothing(length):
    layer, frames = Frames(6, num_features=5), torch.randn(2, 12, 5)
    embedded = layer(frames, torch.tensor([12, length]))
    alone = layer(frames[1:, :length])
    torch.testing.assert_close(embedded.x[1:, : (length + 1) // 2], alone.x)
    assert embedded.keep.sum(1).tolist() == [6, (length + 1) // 2]


def test_a_node_sees_those_whose_edges_lead_to_it(native):
    model = Classifier("nodes", {"num_features": 5}, 3, pool="each", positions="none", **SMALL).eval()
    features, edges = torch.randn(5, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])  # 0 -> 1 -> 2 -> 3, and 4 alone
    out = model(features, edges)
    for changed, reached in ((0, {0, 1, 2}), (3, {3}), (4, {4})):  # two layers carry it two edges far
        other = features.clone()
        other[changed] += 1
        moved = (model(other, edges) - out).abs().amax(-1)[0] > 1e-7
        assert set(moved.nonzero()[:, 0].tolist()) == reached


@pytest.mark.parametrize("score", ["softmax", "additive"])
def test_a_graph_is_blind_to_the_order_of_its_nodes(native, score):
    model = Classifier("nodes", {"num_features": 5}, 3, pool="each", positions="none", score=score, **SMALL).eval()
    features, edges, order = torch.randn(9, 5), torch.randint(9, (2, 20)), torch.randperm(9)
    back = order.argsort()
    torch.testing.assert_close(model(features[order], back[edges]), model(features, edges)[:, order])


def test_points_see_their_nearest_and_whoever_is_as_near(native):
    line = torch.tensor([[[0.0], [1.0], [2.0], [10.0]]])
    embedded = Points(6, num_heads=2, neighbors=2, num_coordinates=1)(line)
    assert embedded.mask.draw(4).splitlines() == ["██··", "███·", "·██·", "··██"]
    assert embedded.bias.shape == (1, 2, 4, 4)


@pytest.mark.parametrize("lengths", [None, torch.tensor([12, 7])])
def test_permuted_points_give_the_same_class(native, lengths):
    options = {"neighbors": 4, "num_coordinates": 2, "num_features": 1}
    model = Classifier("points", options, 3, pool="mean", positions="none", **SMALL).eval()
    points = torch.randn(2, 12, 3)
    order = torch.cat((torch.randperm(7), torch.arange(7, 12)))
    inputs = (points,) if lengths is None else (points, lengths)
    permuted = (points[:, order],) if lengths is None else (points[:, order], lengths)
    torch.testing.assert_close(model(*permuted), model(*inputs), atol=1e-5, rtol=1e-4)
    if lengths is not None:
        torch.testing.assert_close(model(*inputs)[1:], model(points[1:, :7]), atol=1e-5, rtol=1e-4)


def test_the_relative_coordinates_learn(native):
    model = Classifier("points", {"neighbors": 4}, 3, pool="mean", positions="none", **SMALL)
    model.loss(torch.randn(2, 9, 3), wanted=torch.tensor([0, 2])).backward()
    assert bool(model.embedding.relative[0].weight.grad.any())


def test_columns_are_tokens():
    layer = Columns(6, num_numeric=2, categories=[3, 4])
    numeric, categorical = torch.randn(5, 2), torch.randint(3, (5, 2))
    x = layer(numeric, categorical).x
    torch.testing.assert_close(x[:, 2], numeric[:, 1:] * layer.scale[1] + layer.offset[1])
    torch.testing.assert_close(x[:, 4], layer.table[3 + categorical[:, 1]] + layer.offset[3])
    with pytest.raises(ValueError, match=r"categories must be from 0 to \[2, 3\]; got \[3, 0\] to \[3, 0\]"):
        layer(numeric[:1], torch.tensor([[3, 0]]))
    with pytest.raises(ValueError, match="must have 2 and 2 columns; got 1 and 2"):
        layer(numeric[:, :1], categorical)


DOMAINS = {
    "vit": (lambda: ViT(8, 4, 3, channels=1, **SMALL), lambda: (torch.randn(6, 1, 8, 8),)),
    "frames": (
        lambda: Classifier("frames", {"num_features": 5}, 3, pool="mean", **SMALL),
        lambda: (torch.randn(6, 12, 5), torch.tensor([12, 5, 9, 3, 8, 12])),
    ),
    "tokens": (
        lambda: Classifier("tokens", {"vocab_size": 30}, 3, pool="mean", **SMALL),
        lambda: (torch.randint(30, (6, 9)), torch.tensor([9, 5, 9, 3, 8, 1])),
    ),
    "columns": (
        lambda: Classifier("columns", {"num_numeric": 2, "categories": [3]}, 3, positions="none", **SMALL),
        lambda: (torch.randn(6, 2), torch.randint(3, (6, 1))),
    ),
    "points": (
        lambda: Classifier("points", {"neighbors": 4}, 3, pool="mean", positions="none", **SMALL),
        lambda: (torch.randn(6, 9, 3),),
    ),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_learns(native, name, autocast):
    make, inputs = DOMAINS[name]
    model, given, wanted = make(), inputs(), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(*given, wanted=wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("domain", ["frames", "patches"])
def test_a_translator_reads_sound_and_images(native, domain):
    if domain == "frames":
        model = Seq2Seq(0, 20, domain="frames", options={"num_features": 5}, **SMALL)
        source, lengths = torch.randn(3, 12, 5), torch.tensor([12, 5, 7])
    else:
        options = {"image_size": 8, "patch": 4, "channels": 1}
        model = Seq2Seq(0, 20, domain="patches", options=options, **SMALL)
        source, lengths = torch.randn(3, 1, 8, 8), None
    target, to_lengths = torch.randint(3, 20, (3, 4)), torch.tensor([4, 2, 3])
    keep = torch.arange(4) < to_lengths[:, None]
    logits = model(source, target, lengths, to_lengths)
    loss = model.loss(source, target, lengths, to_lengths)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[keep], target[keep]))
    model.eval()
    out = model.generate(source, lengths, max_new_tokens=5)
    again = model(source, out.tokens, lengths)
    for row, length in enumerate(out.lengths.tolist()):
        assert torch.equal(again[row, :length].argmax(-1), out.tokens[row, :length])


def test_words_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="Classifier: domain must be one of tokens, .*; got 'smells'"):
        Classifier("smells", {}, 3)
    with pytest.raises(ValueError, match="Classifier: pool must be one of first, mean, each; got 'max'"):
        Classifier("points", {"neighbors": 3}, 3, pool="max")
    with pytest.raises(ValueError, match="Seq2Seq: domain must be 'tokens', 'frames' or 'patches'; got 'nodes'"):
        Seq2Seq(0, 20, domain="nodes", **SMALL)
    with pytest.raises(ValueError, match="target_vocab_size must be given where the source is no text; got None"):
        Seq2Seq(0, domain="frames", options={"num_features": 5}, **SMALL)
