"""Keys and values of the tokens so far, for decoding.

Enters: the keys and values of new tokens.
Leaves: all that are held, as views of one preallocated buffer, and the offsets at which queries and keys then stand.
Floor 1: above check, below the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard import check

_FIRST = 64  # tokens that the first buffer has room for, at least


class KVCache:
    """Holds keys and values, grows by doubling, and knows where everything stands.

    Append costs O(new tokens), averaged over a generation. With `left` it lets go of keys that no later query of
    `sliding_window(left, ...)` can see: memory stays O(left), and `key_offset` says where the first held key stands.
    The
    cache is no mask: pass the mask as well.

    Args:
        left: keys that a query sees before its own position, as in `masks.sliding_window(left, 0)`. Default None: all.
        max_length: most keys held at once; to append past it is an error. Default 131,072.

    Raises:
        ValueError: where left is negative or max_length is not at least 1.

    Example:
        >>> import regard
        >>> cache = KVCache()
        >>> new = torch.randn(3, 1, 1, 4, 8).unbind()  # q, k, v of 4 tokens
        >>> out = regard.attention(*new, mask=regard.masks.causal(), cache=cache, backend="reference")
        >>> new = torch.randn(3, 1, 1, 1, 8).unbind()  # and of the next one
        >>> out = regard.attention(*new, mask=regard.masks.causal(), cache=cache, backend="reference")
        >>> cache
        KVCache(5 keys at positions 0 to 4, room for 64)
    """

    def __init__(self, *, left: int | None = None, max_length: int = 131_072) -> None:
        self.left = None if left is None else check.count("KVCache", "left", left, 0)
        self.max_length = check.count("KVCache", "max_length", max_length, 1)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._start = self._stop = 0  # of the held tokens, in the buffer
        self._position = 0  # of the next token, in the sequence

    @property
    def position(self) -> int:
        """Position of the next token: how many have been appended."""
        return self._position

    @property
    def key_offset(self) -> int:
        """Position of the first held key."""
        return self._position - len(self)

    @property
    def keys(self) -> Tensor:
        """Held keys `(batch, num_kv_heads, seq_len_kv, head_dim)`, a view that the next append may invalidate."""
        return self._held(self._keys)

    @property
    def values(self) -> Tensor:
        """Held values `(batch, num_kv_heads, seq_len_kv, head_dim_v)`, a view that the next append may invalidate."""
        return self._held(self._values)

    def __len__(self) -> int:
        return self._stop - self._start

    def __repr__(self) -> str:
        room = 0 if self._keys is None else self._keys.shape[2]
        span = f" at positions {self.key_offset} to {self._position - 1}" if len(self) else ""
        return f"KVCache({len(self)} keys{span}, room for {room})"

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new tokens and return all that are held.

        Args:
            k: `(batch, num_kv_heads, new, head_dim)`.
            v: `(batch, num_kv_heads, new, head_dim_v)`.

        Returns:
            `(keys, values)`, the new ones last; the first new query stands at the old `position`.

        Raises:
            ValueError, TypeError: where k and v do not fit what is held, are to be differentiated, or pass
                `max_length`.
        """
        kept = self.after(k, v) - k.shape[2]
        with torch.no_grad():
            self._start = self._stop - kept
            keys, values = self._room(k, v)
            stop = self._stop + k.shape[2]
            keys[:, :, self._stop : stop] = k
            values[:, :, self._stop : stop] = v
        self._stop = stop
        self._position += k.shape[2]
        return self.keys, self.values

    def after(self, k: Tensor, v: Tensor) -> int:
        """Number of keys that will be held once k and v are appended; refuses what `append` refuses."""
        if self._keys is not None and self._values is not None:
            for name, new, held in (("k", k, self._keys), ("v", v, self._values)):
                if (*new.shape[:2], new.shape[3]) != (*held.shape[:2], held.shape[3]):
                    own = (*held.shape[:2], "new", held.shape[3])
                    raise ValueError(
                        f"KVCache.append: {name} must be {own} like what is held; got {tuple(new.shape)}. "
                        "Use a cache per layer and batch."
                    )
                if new.dtype != held.dtype:
                    raise TypeError(
                        f"KVCache.append: {name} must be {held.dtype} like what is held; got {new.dtype}. Convert it."
                    )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "KVCache.append: k and v must not require a gradient; got tensors that do. "
                "Decode under torch.no_grad()."
            )
        kept = len(self) if self.left is None else min(len(self), self.left)
        if kept + k.shape[2] > self.max_length:
            raise ValueError(
                f"KVCache.append: the keys held must be at most max_length = {self.max_length}; got {kept} and "
                f"{k.shape[2]} new ones. Make the cache with a larger max_length, or with left= for a sliding window."
            )
        return kept + k.shape[2]

    def select(self, rows: Tensor) -> None:
        """Go on with these batch rows, in this order, repeats allowed: beams that part, sentences that are done.

        Args:
            rows: int64 `(new batch,)`, numbers of the rows held now.
        """
        if self._keys is not None and self._values is not None:
            with torch.no_grad(), torch.inference_mode(False):
                self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)

    def reset(self) -> None:
        """Let go of every token; the next one stands at position 0."""
        self._keys = self._values = None
        self._start = self._stop = self._position = 0

    def _held(self, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            raise ValueError("KVCache: keys and values must have been appended; got none yet. Call append first.")
        return buffer[:, :, self._start : self._stop]

    def _room(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Buffers with room for the new tokens behind the held ones; moved to twice the need where they have none."""
        keys, values = self._keys, self._values
        if keys is None or values is None or self._stop + k.shape[2] > keys.shape[2]:
            held = len(self)
            capacity = max(_FIRST, 2 * (held + k.shape[2]))
            with torch.inference_mode(False):  # buffers that outlive an inference_mode block can still be written
                new_keys, new_values = (
                    torch.empty(*t.shape[:2], capacity, t.shape[3], dtype=t.dtype, device=t.device) for t in (k, v)
                )
            if keys is not None and values is not None:
                new_keys[:, :, :held] = keys[:, :, self._start : self._stop]
                new_values[:, :, :held] = values[:, :, self._start : self._stop]
            keys, values = self._keys, self._values = new_keys, new_values
            self._start, self._stop = 0, held
        return keys, values
