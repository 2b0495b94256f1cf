"""Maps of any size: every tile of every level says what the dense weights say, within bounded memory."""

import threading

import numpy as np
import pytest
import torch

from regard import masks, op
from regard.lens import maps as rooms
from regard.lens.layers import Keys, Layer, RecordedBias, Step
from regard.lens.maps import CELLS, Maps, level_of, pooled
from regard.lens.opened import look_at, open_look
from regard.lens.payload import blob, first_selection, payload
from regard.lens.recording import Recording

HEADS, GROUPS, DIM = 4, 2, 16


def recording(n, *, keys=None, mask=None, bias=None, windows=1, offset=0, seed=0):
    """Random queries and keys with their exact sums."""
    torch.manual_seed(seed)
    m = keys or n
    steps = []
    for window in range(windows):
        q, k = torch.randn(1, HEADS, n, DIM) * 2, torch.randn(1, GROUPS, m, DIM) * 2
        diagonal = None if bias is None else bias
        lse = op.attend(
            q, k, k[..., :1].contiguous(), mask=mask, bias=None, diagonal=diagonal, sinks=None, scale=0.25,
            softcap=None, dropout=0.0, query_offset=offset, key_offset=0,
        )[1]  # fmt: skip
        held = Keys(k, torch.rand(1, GROUPS, m) + 0.5)
        given = None if bias is None else RecordedBias(None, diagonal)
        steps.append(Step(window, q, lse, held, ((0, m),), 0.25, None, mask, given, None, offset, 0))
    kind = "decoder" if m == n else "cross"
    return Recording([Layer(f"layers.{at}", at, kind, steps) for at in (0, 1)], {"id": "synthetic"})


def dense(look, layer, head):
    """Weights in float64, written plainly."""
    step = look.attentions[0].layers[layer].steps[0]
    q, k = step.q[0, head].double(), step.k[0, head // (HEADS // GROUPS)].double()
    scores = q @ k.T * step.scale
    n, m = scores.shape
    if step.bias is not None:
        index = torch.arange(m)[None] - torch.arange(n)[:, None] + n - 1
        scores = scores + step.bias.diagonal[0, head].double()[index]
    if step.mask is not None:
        every = [torch.arange(size).reshape(shape) for size, shape in
                 ((1, (1, 1, 1, 1)), (1, (1, 1, 1, 1)), (n, (1, 1, n, 1)), (m, (1, 1, 1, m)))]  # fmt: skip
        from regard.positions import Frame

        seen = step.mask.visible(Frame(1, HEADS, n, m, step.query_offset, 0), *every)
        scores = scores.masked_fill(~seen[0, 0], -torch.inf)
    return scores.softmax(-1).nan_to_num(0).numpy()


def blocks_of(weights, size, kind):
    if size == 1:
        return weights
    rows, cols = (-(-length // size) for length in weights.shape)
    out = np.zeros((rows, cols))
    for r in range(rows):
        for c in range(cols):
            part = weights[r * size : (r + 1) * size, c * size : (c + 1) * size]
            out[r, c] = part.sum() if kind == "mass" else part.max()
    return out


def settled(maps, *tile):
    """The tile, once it is exact."""
    for _ in range(2000):
        found = maps.tile(*tile)
        if found.share == 1:
            return found
        threading.Event().wait(0.01)
    raise AssertionError("the pass did not end")


MASKS = {
    "everything": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(70, 0),
    "documents": masks.causal() & masks.documents(torch.arange(700) // 300),
    "a tensor": masks.from_tensor(torch.rand(1, 1, 700, 700) > 0.5),
}


@pytest.mark.parametrize("name", MASKS)
def test_every_tile_of_every_level_is_the_dense_map(name, native):
    look = look_at(recording(700, mask=MASKS[name]))
    maps = Maps(look)
    for layer, head in ((0, 0), (1, 3)):
        weights = dense(look, layer, head)
        for kind in rooms.KINDS:
            for level in range(level_of(700, CELLS) + 1):
                expected = blocks_of(weights, 1 << level, kind)
                side = -(-700 // (CELLS << level))
                for row in range(side):
                    for col in range(side):
                        tile = maps.tile(0, layer, head, kind, level, row, col)
                        assert tile.share == 1
                        own = expected[row * CELLS : (row + 1) * CELLS, col * CELLS : (col + 1) * CELLS]
                        assert tile.numbers.dtype == torch.float32
                        np.testing.assert_allclose(tile.numbers, own, rtol=3e-5, atol=2e-6)


def test_a_bias_by_distance_is_part_of_every_tile(native):
    diagonal = torch.randn(1, HEADS, 2 * 600 - 1)
    look = look_at(recording(600, mask=masks.causal(), bias=diagonal))
    maps, weights = Maps(look), dense(look_at(recording(600, mask=masks.causal(), bias=diagonal)), 0, 2)
    for level in range(level_of(600, CELLS) + 1):
        expected = blocks_of(weights, 1 << level, "mass")
        row = -(-600 // (CELLS << level)) - 1
        tile = maps.tile(0, 0, 2, "mass", level, row, 0).numbers
        own = expected[row * CELLS : (row + 1) * CELLS, :CELLS]
        np.testing.assert_allclose(tile, own, rtol=3e-5, atol=2e-6)


def test_a_long_map_is_shown_in_part_and_becomes_exact(native, monkeypatch):
    monkeypatch.setattr(rooms, "BAND", 1 << 16)
    monkeypatch.setattr(rooms, "BLOCKS", 256)
    look = look_at(recording(1500, mask=masks.causal()))
    maps, weights = Maps(look), dense(look_at(recording(1500, mask=masks.causal())), 0, 1)
    top = level_of(1500, CELLS)
    monkeypatch.setattr(Maps, "_run", lambda self: None)  # nothing goes on behind
    first = maps.tile(0, 0, 1, "max", top, 0, 0)
    assert 0 < first.share < 1
    assert first.numbers.max() > 0
    monkeypatch.undo()
    maps._thread = None
    last = settled(maps, 0, 0, 1, "max", top, 0, 0)
    np.testing.assert_allclose(last.numbers, blocks_of(weights, 1 << top, "max"), rtol=3e-5, atol=2e-6)
    mass = settled(maps, 0, 0, 1, "mass", top, 0, 0).numbers
    np.testing.assert_allclose(mass, blocks_of(weights, 1 << top, "mass"), rtol=3e-5, atol=2e-6)
    maps.close()


def test_what_is_kept_is_bounded(native):
    look = look_at(recording(1100, mask=masks.causal()))
    room = 3 * 4 * CELLS * CELLS
    maps = Maps(look, kept=room)
    for head in range(HEADS):
        for row in range(4):
            maps.tile(0, 0, head, "max", 0, row, 0)
            assert maps._bytes <= room
    again = maps.tile(0, 0, 0, "max", 0, 0, 0).numbers
    np.testing.assert_allclose(again, dense(look, 0, 0)[:CELLS, :CELLS], rtol=3e-5, atol=2e-6)


def test_rows_columns_and_vectors_are_exact(native):
    look = look_at(recording(500, mask=masks.causal()))
    maps, weights = Maps(look), dense(look, 1, 2)
    np.testing.assert_allclose(maps.answer("row/0/1/2/40/43").numbers, weights[40:43].mean(0), rtol=3e-5, atol=1e-6)
    np.testing.assert_allclose(maps.answer("col/0/1/2/7/9").numbers, weights[:, 7:9].sum(1), rtol=3e-5, atol=1e-6)
    step = look.attentions[0].layers[1].steps[0]
    both = maps.answer("vectors/0/1/2/44/8").numbers
    assert torch.equal(both[0], step.q[0, 2, 44])
    assert torch.equal(both[1], step.k[0, 1, 8])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("tile/0/0/4/max/0/0/0", r"map: head must be from 0 to 3; got 4. Choose one of those."),
        ("tile/0/0/0/max/9/0/0", r"map: level must be from 0 to 1; got 9."),
        ("tile/0/0/0/max/0/2/0", r"map: row of tiles must be from 0 to 1; got 2."),
        ("tile/0/0/0/max/0/0/999999999", r"map: column of tiles must be from 0 to 1; got 999999999."),
        ("row/0/0/0/5/5", r"map: row must be a range of at most 256 tokens below 500; got 5 to 5. Ask for less."),
        ("col/0/0/0/0/400", r"map: col must be a range of at most 256 tokens below 500; got 0 to 400."),
        ("vectors/0/0/0/500/0", r"map: query must be from 0 to 499; got 500."),
    ],
)
def test_a_tile_that_there_is_not_is_refused(key, message, native):
    with pytest.raises(ValueError, match=message):
        Maps(look_at(recording(500))).answer(key)


@pytest.mark.parametrize("key", ["tile/1/0/0/max/0/0/0", "tile/0/7/0/max/0/0/0", "tile/0/0/0/mean/0/0/0",
                                 "tile/0/0/0/0/0/0", "row/0/0/0/max/0/1/2", "cell/0/0/0/1/2", ""])  # fmt: skip
def test_keys_of_nothing_give_nothing(key, native):
    assert Maps(look_at(recording(300))).answer(key) is None


def test_pooling_is_the_same_by_halves_and_at_once():
    cells = np.random.default_rng(0).random((37, 53)).astype(np.float32)
    for kind in rooms.KINDS:
        np.testing.assert_allclose(pooled(cells, 8, kind), blocks_of(cells, 8, kind), rtol=1e-6)


def test_many_threads_get_the_same_numbers(native):
    look = look_at(recording(900, mask=masks.causal()))
    maps, found = Maps(look), []
    ask = lambda: found.append(maps.tile(0, 0, 1, "max", 1, 0, 0).numbers.clone())  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_saved_recording_opens_as_a_look_at_each_of_its_texts(tmp_path, native, monkeypatch):
    recording(300, mask=masks.causal(), windows=3).save(tmp_path / "held")
    monkeypatch.setattr("regard.lens.look.LARGEST_MAP", 1000)
    monkeypatch.setattr("regard.lens.payload.MANY", 100)
    looks = [open_look(tmp_path / "held", window) for window in range(3)]
    assert [look.window for look in looks] == [(0, 3), (1, 3), (2, 3)]
    assert looks[0].loaded.model is None
    page = payload(looks[1], first_selection(looks[1], None, None, None), live=True)
    assert page["window"] == [1, 3]
    assert page["runs"] is False
    assert page["sides"] == [{"name": "text", "count": 300}]
    assert page["attentions"][0]["long"]
    assert any("named by its place" in note for note in page["notes"])
    assert blob(looks[1], "weights/0/0") is None
    assert blob(looks[1], "thumbs/0").shape == [2, HEADS, 24, 24]
    assert not torch.equal(*(look.attentions[0].layers[0].steps[0].q for look in looks[:2]))
    with pytest.raises(ValueError, match=r"look: window must be from 0 to 2; got 3. Choose one of those."):
        open_look(tmp_path / "held", 3)
