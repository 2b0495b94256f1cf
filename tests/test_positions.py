"""Frames: indices of a call become positions in the sequence."""

import torch

from regard.positions import Frame, at


def test_query_and_key_positions_are_shifted_by_their_offsets():
    frame = Frame(2, 1, 3, 2, query_offset=4, key_offset=-1)
    assert frame.query_positions().tolist() == [[4, 5, 6]]
    assert frame.key_positions().tolist() == [[-1, 0]]


def test_an_offset_per_batch_row_gives_a_row_of_positions_each():
    frame = Frame(2, 1, 3, 2, query_offset=torch.tensor([0, 10]), key_offset=torch.tensor([-5, 1]))
    assert frame.query_positions().tolist() == [[0, 1, 2], [10, 11, 12]]
    assert frame.key_positions().tolist() == [[-5, -4], [1, 2]]
    assert frame.query_positions().dtype == torch.int64


def test_relative_positions_run_along_the_diagonals():
    for offsets in ((0, 0), (3, -2), (torch.tensor([1, 5]), 2), (torch.tensor([1, 5]), torch.tensor([0, 9]))):
        frame = Frame(2, 1, 3, 4, *offsets)
        distance = frame.key_positions()[:, None, :] - frame.query_positions()[:, :, None]
        diagonals = frame.relative_positions()
        assert diagonals.shape[1] == 3 + 4 - 1
        for i in range(3):
            for j in range(4):
                assert torch.equal(diagonals[:, j - i + 2], distance[:, i, j])


def test_indices_are_placed_for_the_batch_rows_asked_for():
    index, batch = torch.arange(3)[None, None, None], torch.tensor([1, 0])[:, None, None, None]
    assert at(index, 7, batch).tolist() == [[[[7, 8, 9]]]]
    assert at(index, torch.tensor([10, 20]), batch).tolist() == [[[[20, 21, 22]]], [[[10, 11, 12]]]]


def test_a_frame_without_queries_or_keys_has_no_positions():
    frame = Frame(1, 1, 0, 0)
    assert frame.query_positions().shape == frame.key_positions().shape == (1, 0)
    assert frame.relative_positions().shape == (1, 0)
