"""Which keys a query may see, as small objects joined by `&`, `|` and `~`.

Enters: lengths, ids, bool tensors or a function.
Leaves: masks (`mask_algebra.Mask`), and the mask that a program of plain ints and tensors spells (`decode`). O(n)
memory unless a tensor was given.
Floor 0: pure, imports torch and numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from regard.mask_algebra import And, Mask, Not, Or
from regard.mask_arguments import INTS, as_tensor, described, not_bool
from regard.mask_recipes import bigbird, longformer, sparse_transformer
from regard.mask_rules import (
    Causal,
    DocumentPairs,
    Documents,
    FromFunction,
    FromTensor,
    Keep,
    Lengths,
    Prefix,
    SlidingWindow,
    known,
    numbered,
)
from regard.mask_shapes import blocks, edges, global_tokens, neighborhood, strided
from regard.mask_sparse import Blocks, Chunk, ChunkEnds, Edges, GlobalTokens, Neighborhood, Strided
from regard.places import Placed

__all__ = [
    "And", "Blocks", "Causal", "Chunk", "ChunkEnds", "DocumentPairs", "Documents", "Edges", "FromFunction",
    "FromTensor", "GlobalTokens", "Keep", "Lengths", "Mask", "Neighborhood", "Not", "Or", "Prefix", "SlidingWindow",
    "Strided", "as_mask", "bigbird", "blocks", "causal", "decode", "documents", "edges", "from_function",
    "from_tensor", "global_tokens", "longformer", "neighborhood", "padding", "prefix", "sliding_window",
    "sparse_transformer", "strided",
]  # fmt: skip


def causal() -> Mask:
    """A query sees the keys at its own position and before.

    key ≤ query, both as positions in the sequence.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Example:
        >>> print(causal().draw(3))
        █··
        ██·
        ███

        Two new queries after three cached keys; five queries of which three come before every key (empty rows):

        >>> print(causal().draw(2, 5, query_offset=3))
        ████·
        █████
        >>> print(causal().draw(5, 2, query_offset=-3))
        ··
        ··
        ··
        █·
        ██

    Source: Vaswani et al. 2017, section 3.2.3.
    """
    return Causal()


def sliding_window(left: int | None, right: int | None) -> Mask:
    """A query sees the keys from `left` positions before it to `right` positions after it.

    query − left ≤ key ≤ query + right, so left + 1 + right keys.

    Args:
        left: keys seen before the query's own position, at least 0; None leaves the side open.
        right: keys seen after it, at least 0; None leaves the side open.

    Returns:
        Mask: positional; calls with seq_len_q ≠ seq_len_kv need a `query_offset`.

    Raises:
        ValueError: where a side is negative.

    Example:
        >>> print(sliding_window(1, 0).draw(4))
        █···
        ██··
        ·██·
        ··██

    Source: Beltagy et al. 2020, section 3.1.
    """
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"masks.sliding_window: {name} must be at least 0; got {side}. Use None for an open side.")
    return SlidingWindow(left, right)


def padding(lengths_or_keep: Tensor | Sequence[int] | np.ndarray) -> Mask:
    """Keys that are padding are seen by no query.

    key < lengths[batch], or keep[batch, key].

    Args:
        lengths_or_keep: ints `(batch,)`, the number of real positions of each batch row (padding on the right); or bool
            `(batch, seq_len_kv)`, True for real keys of this call (padding anywhere, holes).

    Returns:
        Mask: not positional for queries.

    Raises:
        TypeError, ValueError: where it is neither.

    Example:
        >>> print(padding([2]).draw(2, 4))
        ██··
        ██··
        >>> print(padding(torch.tensor([[False, True, True]])).draw(1, 3))
        ·██
    """
    given = as_tensor("masks.padding", lengths_or_keep)
    if given.dtype == torch.bool and given.ndim == 2:
        return Keep(given)
    if given.dtype in INTS and given.ndim == 1:
        return Lengths(given)
    raise ValueError(
        "masks.padding: the argument must be integer lengths (batch,) or a bool keep (batch, seq_len_kv); "
        f"got {described(given)}. Turn a 0/1 attention mask into bool with `!= 0`."
    )


def documents(
    ids: Tensor | Sequence[int] | np.ndarray, key_ids: Tensor | Sequence[int] | np.ndarray | None = None
) -> Mask:
    """A query sees the keys of its own document: several texts packed in one row stay apart.

    ids[query] = ids[key], or query_ids[i] = key_ids[j].

    Args:
        ids: int64 `(seq,)` or `(batch, seq)`. Alone: the document of each position of the sequence. With `key_ids`: the
            document of each query of this call.
        key_ids: the document of each key of this call. Default None.

    Returns:
        Mask: positional with one argument; with two it goes by this call's queries and keys.

    Raises:
        TypeError, ValueError: where ids are not integers or have another number of axes.

    Example:
        >>> print(documents([0, 0, 1]).draw(3))
        ██·
        ██·
        ··█
        >>> print(documents([1, 0], [0, 0, 1]).draw(2, 3))
        ··█
        ██·
    """
    query = _ids("ids", ids)
    return Documents(query) if key_ids is None else DocumentPairs(query, _ids("key_ids", key_ids))


def prefix(length: int | Tensor | Sequence[int]) -> Mask:
    """Every query sees the first keys of the sequence; a prefix language model is `causal() | prefix(n)`.

    key < length.

    Args:
        length: an int, or ints `(batch,)`.

    Returns:
        Mask: not positional for queries.

    Raises:
        TypeError, ValueError: where length is not an int or ints `(batch,)`.

    Example:
        >>> print((causal() | prefix(2)).draw(4))
        ██··
        ██··
        ███·
        ████

    Source: Raffel et al. 2020, figure 3.
    """
    if isinstance(length, (int, torch.SymInt)) and not isinstance(length, bool):
        return Prefix(length)
    given = as_tensor("masks.prefix", length)
    if given.dtype not in INTS or given.ndim > 1:
        raise ValueError(
            f"masks.prefix: length must be an int or ints (batch,); got {described(given)}. Give one per batch row."
        )
    return Lengths(given.reshape(-1))


def from_tensor(allowed: Tensor | np.ndarray) -> Mask:
    """The mask that a bool tensor spells out.

    allowed[batch, head, i, j].

    Args:
        allowed: bool, broadcastable to `(batch, num_heads, seq_len_q, seq_len_kv)`, True = may attend; it indexes this
            call's queries and keys. At most 4 axes.

    Returns:
        Mask: not positional. It is kept as ranges of keys where its rows have few.

    Raises:
        TypeError, ValueError: where it is not bool, or has more than 4 axes.

    Example:
        >>> print(from_tensor(torch.eye(3, dtype=torch.bool)).draw(3))
        █··
        ·█·
        ··█
    """
    given = as_tensor("masks.from_tensor", allowed)
    if given.dtype != torch.bool:
        raise TypeError(not_bool("masks.from_tensor: the mask", given))
    if given.ndim > 4:
        raise ValueError(
            "masks.from_tensor: the mask must have at most 4 axes (batch, num_heads, seq_len_q, seq_len_kv); "
            f"got {described(given)}. Reshape it."
        )
    return FromTensor(given[(None,) * (4 - given.ndim)])


def from_function(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Mask:
    """The mask that a function computes, evaluated tile by tile.

    function(batch, head, query position, key position) on int64 tensors that broadcast against each other.

    Join it with a mask of known shape where there is one: `causal() & from_function(f)` asks f below the diagonal only.
    Make the mask once, outside the loop that uses it.

    Args:
        function: elementwise; returns a bool tensor.

    Returns:
        Mask: positional.

    Raises:
        TypeError: where it is not callable, or (when used) where it returns no bool tensor.

    Example:
        >>> print(from_function(lambda batch, head, p, j: (p - j) % 2 == 0).draw(3))
        █·█
        ·█·
        █·█
    """
    if not callable(function):
        raise TypeError(
            f"masks.from_function: function must be callable; got {type(function).__name__}. Pass f(batch, head, p, j)."
        )
    return numbered(function)


def decode(ops: str, ints: Sequence[int], tensors: Sequence[Tensor]) -> Mask:
    """The mask that `Mask.encode` wrote down.

    Raises:
        ValueError: where the program is broken, or its function was made in another process or long ago.

    Example:
        >>> decode(*(causal() | prefix(3)).encode())
        Or(left=Causal(), right=Prefix(length=3))
    """
    numbers, held = iter(ints), iter(tensors)
    stack: list[Mask] = []
    try:
        for word in ops.split():
            if word in ("and", "or"):
                right, left = stack.pop(), stack.pop()
                stack.append(And(left, right) if word == "and" else Or(left, right))
            elif word == "not":
                stack.append(Not(stack.pop()))
            elif word == "placed":
                stack.append(Placed(stack.pop(), next(numbers)))
            else:
                stack.append(_read(word, numbers, held))
        (mask,) = stack
    except (StopIteration, IndexError, KeyError, ValueError) as broken:
        if isinstance(broken, _UnknownFunctionError):
            raise
        raise ValueError(
            f"masks.decode: the program must be one that Mask.encode wrote; got {ops!r}. Encode the mask again."
        ) from broken
    return mask


def as_mask(value: object, caller: str) -> Mask:
    """`value` as a mask: a mask itself, or a bool tensor; anything else is refused in the name of `caller`."""
    if isinstance(value, Mask):
        return value
    if isinstance(value, Tensor):
        if value.dtype != torch.bool:
            raise TypeError(not_bool(f"{caller}: mask", value))
        return from_tensor(value)
    raise TypeError(
        f"{caller}: mask must be a mask of regard.masks or a bool tensor; got {type(value).__name__}. "
        "Make one, as in regard.masks.causal()."
    )


class _UnknownFunctionError(ValueError):
    pass


def _read(word: str, ints: Iterator[int], tensors: Iterator[Tensor]) -> Mask:
    if word.startswith("window"):
        left = next(ints) if "_left" in word else None
        return SlidingWindow(left, next(ints) if "_right" in word else None)
    if word == "function":
        number = int(next(ints))
        mask = known(number)
        if mask is None:
            raise _UnknownFunctionError(
                f"masks.decode: the function of a from_function mask must be alive in this process; got {number}. "
                "Make the mask again and run again; a program exported to a file cannot hold a Python function."
            )
        return mask
    if word == "document_pairs":
        return DocumentPairs(next(tensors), next(tensors))
    if word == "causal":
        return Causal()
    if word.startswith("neighborhood_"):
        axes = int(word.removeprefix("neighborhood_"))
        grid, window, dilation = (tuple(next(ints) for _ in range(axes)) for _ in range(3))
        return Neighborhood(grid, window, dilation)
    if word == "chunk_ends":
        return ChunkEnds(next(ints), next(ints))
    if word == "blocks":
        return Blocks(next(tensors), next(ints))
    if word in _OF_INT:
        return _OF_INT[word](next(ints))
    return _OF_TENSOR[word](next(tensors))


_OF_INT = {"prefix": Prefix, "strided": Strided, "chunk": Chunk}
_OF_TENSOR = {
    "lengths": Lengths, "keep": Keep, "documents": Documents, "tensor": FromTensor, "global_tokens": GlobalTokens,
    "edges": Edges,
}  # fmt: skip


def _ids(name: str, value: object) -> Tensor:
    given = as_tensor("masks.documents", value)
    if given.dtype not in INTS or given.ndim not in (1, 2):
        raise ValueError(
            f"masks.documents: {name} must be integers (seq,) or (batch, seq); got {described(given)}. "
            "Number the documents."
        )
    return given if given.ndim == 2 else given[None]
