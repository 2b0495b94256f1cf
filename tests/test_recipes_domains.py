"""Recipes of graphs, points, tables and images: short forms on the true data, and what must not matter."""

import gzip
import io
import pickle
import re
from pathlib import Path

import graph
import images
import numpy as np
import points
import pytest
import table
import torch
from flags import DATA


def need(*parts: str) -> Path:
    file = DATA.joinpath(*parts)
    if not file.exists():
        pytest.skip(f"no data here: {'/'.join(parts)}")
    return file


def percent(text: str, before: str) -> float:
    found = re.search(before + r" ([\d.]+)", text)
    assert found, text
    return float(found[1])


# --- graphs ---


def test_a_graph_is_learnt_from_its_edges(native, capsys):
    need("planetoid", "ind.cora.graph")
    graph.main(["--data", "cora", "--short"])
    reached = percent(capsys.readouterr().out, "cora: test")
    # The same network without citations, each paper its own neighbour alone:
    read = graph.read("cora")
    alone = read._replace(edges=torch.arange(len(read.classes)).expand(2, -1))
    blind = 100 * graph.fit(alone, 0, 60).test
    assert reached >= 78
    assert reached >= blind + 15


def test_the_standard_split_is_read_as_published(native):
    need("planetoid", "ind.citeseer.graph")
    for name, nodes, links, num_words, num_classes in (
        ("cora", 2708, 5278, 1433, 7),
        ("citeseer", 3327, 4552, 3703, 6),
    ):
        read = graph.read(name)
        assert (len(read.classes), int(read.classes.max()) + 1, read.num_words) == (nodes, num_classes, num_words)
        assert read.edges.shape == (2, nodes + 2 * links)
        assert read.classes[read.train].bincount().tolist() == [20] * num_classes
        parts = torch.cat((read.train, read.validation, read.test))
        assert (len(read.validation), len(read.test)) == (500, 1000) and len(parts.unique()) == len(parts)


def test_a_graph_file_makes_nothing_but_arrays():
    with pytest.raises(ValueError, match="a file must hold arrays alone; got"):
        graph.ArraysOnly(io.BytesIO(pickle.dumps(Path("x")))).load()


# --- points ---


def test_points_are_learnt(native, tmp_path, capsys):
    need("mnist5k", "mnist_5k.csv.gz")
    points.main(["--short", "--out", str(tmp_path)])
    reached = percent(capsys.readouterr().out, "test accuracy")
    # The nearest mean of how much ink lies in each of 16 squares, where chance is 10 %:
    learned, held_out = points.read(DATA / "mnist5k" / "mnist_5k.csv.gz", 0)
    squares = [d.images.unflatten(1, (4, 7, 4, 7)).mean((2, 4)).flatten(1) for d in (learned, held_out)]
    means = torch.stack([squares[0][learned.classes == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(squares[1], means).argmin(1)
    assert reached >= 100 * float((nearest == held_out.classes).float().mean()) + 5


def test_points_have_no_order(native):
    need("mnist5k", "mnist_5k.csv.gz")
    held_out = points.read(DATA / "mnist5k" / "mnist_5k.csv.gz", 0)[1]
    model = points.make("full").eval()
    dots, lengths = points.dots(held_out.images[:6], 64)
    order = torch.stack([
        torch.cat((torch.randperm(length), torch.arange(length, 64))) for length in lengths.tolist()
    ])  # fmt: skip
    permuted = dots.gather(1, order[..., None].expand_as(dots))
    with torch.no_grad():
        torch.testing.assert_close(model(permuted, lengths), model(dots, lengths), atol=1e-5, rtol=1e-4)


def test_dots_are_the_inked_pixels():
    image = torch.zeros(2, 784)
    image[0, [0, 29, 783]] = torch.tensor([0.9, 0.5, 0.4])
    dots, lengths = points.dots(image, 5)
    assert lengths.tolist() == [3, 1]
    assert sorted(dots[0, :3, 2].tolist()) == pytest.approx([0.4, 0.5, 0.9])
    corner = dots[0, dots[0, :, 2].argmax()]
    torch.testing.assert_close(corner[:2], torch.tensor([-5.0, -5.0]))


# --- tables ---


def test_a_table_is_learnt(native, tmp_path, capsys):
    need("adult", "adult.data")
    pytest.importorskip("sklearn", reason="needs tool: scikit-learn (the extra `recipes`)")
    table.main(["--short", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    own, trees = percent(said, "test AUC"), percent(said, "trees")
    # A ranking by years of schooling alone:
    from sklearn.metrics import roc_auc_score

    rows = table.read(DATA / "adult" / "adult.data", 0).test
    one_column = max(roc_auc_score(rows.wanted, rows.numeric[:, at]) for at in range(rows.numeric.shape[1]))
    assert own >= one_column + 0.15
    assert own >= 0.915 and own >= trees - 0.012


def test_ranks_keep_order_and_know_their_own_rows_alone():
    column = np.array([3.0, 1.0, 2.0, 2.0, 100.0, -7.0])
    ranks = table.ranked(column, np.array([0, 1, 2, 3]))
    assert (np.argsort(ranks, kind="stable") == np.argsort(column, kind="stable")).all()
    assert ranks[2] == ranks[3] == pytest.approx(0.0)
    np.testing.assert_array_equal(ranks[:4], table.ranked(column[:4], np.arange(4)))


@pytest.mark.parametrize("text", ["a,b\n1,2\n3\n", "a,b\n", ""])
def test_a_torn_or_empty_table_is_refused(text, tmp_path):
    file = tmp_path / "table.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match="must have a header, and rows of as many fields"):
        table.read(file, 0)


def test_digits_of_another_form_are_refused(tmp_path):
    file = tmp_path / "digits.csv.gz"
    file.write_bytes(gzip.compress(b"1,2\n3,4\n"))
    with pytest.raises(ValueError, match=r"must have 784 pixels and a label in a row; got \(2, 2\)"):
        points.read(file, 0)


# --- images ---


def test_pictures_are_learnt(native, tmp_path, capsys):
    folder = need("fashion_mnist_t10k", "t10k-images-idx3-ubyte.gz").parent
    images.main(["--short", "--out", str(tmp_path)])
    reached = percent(capsys.readouterr().out, "test accuracy")
    # The nearest mean picture:
    learned, held_out = images.read(folder, 0)
    means = torch.stack([learned.images[learned.classes == kind].mean(0).flatten() for kind in range(10)])
    nearest = torch.cdist(held_out.images.flatten(1), means).argmin(1)
    assert reached >= 100 * float((nearest == held_out.classes).float().mean()) + 5


def test_pictures_held_out_are_none_of_those_learnt_from():
    folder = need("fashion_mnist_t10k", "t10k-images-idx3-ubyte.gz").parent
    learned, held_out = images.read(folder, 0)
    assert (len(learned.classes), len(held_out.classes)) == (8500, 1500)
    both = torch.cat((learned.images, held_out.images))
    file = images.idx(folder / "t10k-images-idx3-ubyte.gz", 3)
    assert float(both.sum()) == pytest.approx(float(((file / 255 - 0.286) / 0.353).sum()), rel=1e-4)
    other = images.read(folder, 1)[1]
    assert not torch.equal(other.classes, held_out.classes)


def test_varied_pictures_are_moved_and_mirrored_whole():
    picture = torch.zeros(200, 1, 28, 28)
    picture[:, 0, 10, 12] = 1.0
    varied = images.varied(picture)
    assert bool((varied.sum((1, 2, 3)) == 1).all())
    at = varied[:, 0].nonzero()
    assert set(at[:, 1].tolist()) == set(range(8, 13))
    assert set(at[:, 2].tolist()) == set(range(10, 18))


@pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03\0\0\0\x01", b"\0\0\x08\x01\0\0\0\x09abc"])
def test_a_torn_file_of_pictures_is_refused(content, tmp_path):
    file = tmp_path / "torn.gz"
    file.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"torn.gz must hold . axes of bytes; got"):
        images.idx(file, 1 if content[3:4] == b"\x01" else 3)
