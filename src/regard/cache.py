"""Keys and values of the tokens so far, for decoding.

Enters: the keys and values of new tokens.
Leaves: all that are held, where the kernel can read them, and the offsets at which queries and keys then stand.
Floor 1: above check, below the operator. `cache_strip` and `cache_pages` keep the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard import check
from regard.cache_pages import Paged, PagePool
from regard.cache_strip import Strip
from regard.held import Held, coded
from regard.native import KEYS


class KVCache:
    """Holds keys and values, grows by doubling, and knows where everything stands.

    Append costs O(new tokens), averaged over a generation. With `left` it lets go of keys that no later query of
    `sliding_window(left, ...)` can see: memory stays O(left), and `key_offset` says where the first held key stands.
    With `first` it keeps the first tokens of the sequence all the same (attention sinks): whoever attends then sees
    those and the window, each at its true position. With `page_size` it lives in pages, which `fork` and `reorder`
    share instead of copying. The cache is no mask: pass the mask as well.

    Args:
        left: keys that a query sees before its own position, as in `masks.sliding_window(left, 0)`. Default None: all.
        max_length: most keys of a row held at once; to append past it is an error. Default 131,072.
        first: tokens at the start of the sequence that are kept whatever `left` says. Default 0.
        page_size: tokens of a page, a multiple of 64. Default None: no pages. Not with `left`.
        max_pages: most pages, of all caches forked from this one; to append past it is an error. Default 65,536.
        dtype: torch.int8 stores each row of k and v as codes with a float32 scale: off by at most
            max|row| / 254, at about a half (bfloat16) or a quarter (float32) of the memory. Default None: as given.

    Raises:
        ValueError: where left or first is negative, max_length, max_pages or page_size is not at least 1, page_size is
            not a multiple of 64 or meets left, or dtype is another.

    Example:
        >>> import regard
        >>> cache = KVCache()
        >>> new = torch.randn(3, 1, 1, 4, 8).unbind()  # q, k, v of 4 tokens
        >>> out = regard.attention(*new, mask=regard.masks.causal(), cache=cache, backend="reference")
        >>> new = torch.randn(3, 1, 1, 1, 8).unbind()  # and of the next one
        >>> out = regard.attention(*new, mask=regard.masks.causal(), cache=cache, backend="reference")
        >>> cache
        KVCache(5 keys at positions 0 to 4, room for 64)

    Source: Xiao et al. 2023 (first tokens and a window); Kwon et al. 2023 (pages).
    """

    def __init__(
        self,
        *,
        left: int | None = None,
        max_length: int = 131_072,
        first: int = 0,
        page_size: int | None = None,
        max_pages: int = 65_536,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.left = None if left is None else check.count("KVCache", "left", left, 0)
        self.max_length = check.count("KVCache", "max_length", max_length, 1)
        self.first = check.count("KVCache", "first", first, 0)
        self.page_size = None if page_size is None else check.count("KVCache", "page_size", page_size, 1)
        max_pages = check.count("KVCache", "max_pages", max_pages, 1)
        if self.page_size is not None and self.page_size % KEYS:
            raise ValueError(
                f"KVCache: page_size must be a multiple of {KEYS}; got {page_size}. Use {KEYS}, 128 or 256."
            )
        if self.page_size is not None and self.left is not None:
            raise ValueError(
                f"KVCache: left must be None where there are pages; got {left}. Leave out page_size, or left."
            )
        if dtype not in (None, torch.int8):
            raise ValueError(
                f"KVCache: dtype must be torch.int8 or None; got {dtype}. Leave it out: tokens are kept as they come."
            )
        self.coded = dtype is not None
        self._simple = left is None and page_size is None and dtype is None  # nothing but a buffer
        self._strip = Strip(self.first)
        self._pages: Paged | None = None
        self._pool = None if self.page_size is None else PagePool(self.page_size, max_pages)
        self._shape: tuple[int, int, int, int] | None = None  # batch, num_kv_heads, head_dim, head_dim_v
        self._dtype = torch.float32  # of the tokens that came
        self._lengths: Tensor | None = None  # int64 (batch,), where rows have lengths of their own
        self._position = 0  # of the next token, in the sequence

    # ---- what is held, and where it stands ----

    @property
    def position(self) -> int | Tensor:
        """Position of the next token: how many have been appended; int64 `(batch,)` where rows differ."""
        return self._position if self._lengths is None else self._lengths.clone()

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row, int64 `(batch,)`, once `taking` has given rows lengths of their own; else None."""
        return None if self._lengths is None else self._lengths.clone()

    @property
    def key_offset(self) -> int:
        """Position of the first held key; where `first` tokens were parted from the window, see `key_positions`."""
        return self._position - len(self) if self._lengths is None else 0

    @property
    def key_positions(self) -> Tensor:
        """Position of each held key, int64 `(len(cache),)`."""
        positions = torch.arange(self.key_offset, self.key_offset + len(self))
        positions[: self.parted] = torch.arange(self.parted)
        return positions

    @property
    def parted(self) -> int:
        """How many of the first keys stand at positions 0, 1, ... with a gap behind them; 0 while there is none."""
        return self.first if self._strip.broken else 0

    def parted_after(self) -> int:
        """The same once more tokens are appended."""
        return self.first if self.first and (self._strip.broken or self.kept < len(self)) else 0

    @property
    def batch(self) -> int | None:
        """Batch rows, None before the first append."""
        return None if self._shape is None else self._shape[0]

    @property
    def keys(self) -> Tensor:
        """Held keys `(batch, num_kv_heads, seq_len_kv, head_dim)`, a view that the next append may invalidate.

        A copy where the cache has pages or codes. Of rows with lengths of their own, what lies past them is undefined.
        """
        return self.held().written_out()[0]

    @property
    def values(self) -> Tensor:
        """Held values `(batch, num_kv_heads, seq_len_kv, head_dim_v)`, likewise."""
        return self.held().written_out()[1]

    def held(self) -> Held:
        """All that is held, as the decode kernel reads it."""
        if self._shape is None:
            raise ValueError("KVCache: keys and values must have been appended; got none yet. Call append first.")
        table = None if self._pages is None else self._pages.table()
        kinds = self._strip.views() if self._pages is None else self._pages.pool.buffers
        scales = [t[..., 0] for t in kinds[2:]] or [None, None]
        return Held(kinds[0], kinds[1], len(self), table, *scales, dtype=self._dtype)

    def __len__(self) -> int:
        return max(self._pages.lengths, default=0) if self._pages is not None else len(self._strip)

    def __repr__(self) -> str:
        room = self._strip.room if self._pool is None else self._pool.max_pages * self._pool.page_size
        span = f" at positions {self.key_offset} to {self.key_offset + len(self) - 1}" if len(self) else ""
        return f"KVCache({len(self)} keys{span}, room for {room})"

    # ---- taking tokens in ----

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Take in new tokens and return all that are held.

        Args:
            k: `(batch, num_kv_heads, new, head_dim)`.
            v: `(batch, num_kv_heads, new, head_dim_v)`.
            counts: int64 `(batch,)`, how many of the new tokens of each row there are: the first ones. Default None:
                all.

        Returns:
            `(keys, values)`, the new ones last; the first new query stands at the old `position`.

        Raises:
            ValueError, TypeError: where k and v do not fit what is held, are to be differentiated, or pass
                `max_length` or `max_pages`; where counts are not so many numbers from 0 to new.
        """
        self.take_in(k, v, counts)
        return self.held().written_out()

    def take_in(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> None:
        """`append` without the answer: nothing is written out."""
        if counts is None and self._appended(k, v):
            return
        self.after(k, v, counts)
        batch, num_kv_heads, new, head_dim = k.shape
        if self._shape is None:
            self._shape, self._dtype = (batch, num_kv_heads, head_dim, v.shape[3]), k.dtype
        with torch.no_grad():
            kinds = [k, v]
            if self.coded:
                (k, key_scales), (v, value_scales) = coded(k), coded(v)
                kinds = [k, v, key_scales[..., None], value_scales[..., None]]
            if counts is not None and self._lengths is None:
                self._lengths = torch.full((batch,), self._position)
            if self._pool is not None:
                if self._pages is None:
                    self._pages = Paged(self._pool, [[]] * batch, [0] * batch)
                self._pages.append(kinds, [new] * batch if counts is None else counts.tolist())
            elif self._lengths is not None:
                counts = torch.full_like(self._lengths, new) if counts is None else counts
                self._strip.append_ragged(kinds, self._lengths, counts)
            else:
                kept = self.kept
                if kept < len(self):
                    self._strip.drop(kept - self.first)
                self._strip.append(kinds)
        if self._lengths is None:
            self._position += new
        else:
            self._lengths = self._lengths + (new if counts is None else counts)
            self._position = int(self._lengths.max()) if batch else 0

    def _appended(self, k: Tensor, v: Tensor) -> bool:
        """The common step, a token that fits behind the others of a plain buffer, in few instructions; or False."""
        strip, new = self._strip, k.shape[2]
        stop = strip.stop + new
        if not (self._simple and strip.buffers) or self._lengths is not None or stop > min(strip.room, self.max_length):
            return False
        keys, values = strip.buffers
        if (k.dtype, v.dtype) != (keys.dtype, values.dtype) or v.shape[2] != new:
            return False
        if (*k.shape[:2], k.shape[3]) != (*keys.shape[:2], keys.shape[3]):
            return False
        if (*v.shape[:2], v.shape[3]) != (*values.shape[:2], values.shape[3]):
            return False
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return False
        keys.narrow(2, strip.stop, new).copy_(k)
        values.narrow(2, strip.stop, new).copy_(v)
        strip.stop = stop
        self._position += new
        return True

    def after(self, k: Tensor, v: Tensor, counts: Tensor | None = None) -> int:
        """Number of keys that will be held once k and v are appended; refuses what `append` refuses."""
        self._check_like(k, v)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise ValueError(
                "KVCache.append: k and v must not require a gradient; got tensors that do. "
                "Decode under torch.no_grad()."
            )
        batch, new = k.shape[0], k.shape[2]
        kept = self.kept
        longest = kept + new
        if counts is not None:
            self._check_counts(counts, batch, new)
            before = self._position if self._lengths is None else self._lengths
            longest = int((before + counts).max()) if batch else 0
        if longest > self.max_length:
            raise ValueError(
                f"KVCache.append: the keys held must be at most max_length = {self.max_length}; got {kept} and "
                f"{longest - kept} new ones. Make the cache with a larger max_length, or with left= for a sliding "
                "window."
            )
        if self._pool is not None:
            wanted = [new] * batch if counts is None else counts.tolist()
            needed = (self._pages or Paged(self._pool, [[]] * batch, [0] * batch)).needed(wanted)
            if needed > self._pool.left:
                raise ValueError(
                    f"KVCache.append: the pages held must be at most max_pages = {self._pool.max_pages}; got "
                    f"{self._pool.used} and {needed} new ones. Reset caches that are done, or make it with more."
                )
        return longest

    def taking(self, counts: Tensor) -> Taking:
        """This cache for one call of `attention`, of whose new tokens each row has its own number.

        Args:
            counts: int64 `(batch,)`: the first counts[b] of row b's new tokens are appended, at the row's own
                position. What the call returns for the queries past them means nothing.

        Example:
            >>> import regard
            >>> cache = KVCache()
            >>> q, k, v = torch.randn(3, 2, 1, 5, 8).unbind()  # prompts of 5 and 3 tokens, filled up at the end
            >>> counts = torch.tensor([5, 3])
            >>> out = regard.attention(q, k, v, mask=regard.masks.causal(), cache=cache.taking(counts))
            >>> cache.lengths
            tensor([5, 3])
        """
        return Taking(self, counts)

    # ---- changing what is held ----

    def reset(self) -> None:
        """Let go of every token; the next one stands at position 0."""
        if self._pages is not None:
            self._pages.release()
        self._strip, self._pages, self._shape = Strip(self.first), None, None
        self._lengths, self._position = None, 0

    def crop(self, length: int) -> None:
        """Let go of every token at position `length` and after it, as where drafted tokens were refused.

        Args:
            length: tokens of each row that stay, at most; rows that have fewer keep theirs.

        Raises:
            ValueError: where length is negative, or the next query would miss keys that `left` has let go.
        """
        length = check.count("KVCache.crop", "length", length, 0)
        if length >= self._position:
            return
        start = self.key_offset + self.parted  # the window's first position
        if self.left is not None and start > self.parted and length - self.left < start:
            raise ValueError(
                f"KVCache.crop: length must be at least {start + self.left}, as keys before position {start} were let "
                f"go; got {length}. Make the cache with a larger left."
            )
        if self._pages is not None:
            self._pages.crop([min(own, length) for own in self._pages.lengths])
        else:
            self._strip.crop(self._position - length)
        self._position = length
        if self._lengths is not None:
            self._lengths = self._lengths.clamp(max=length)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Make batch row b what row `rows[b]` was: rows may be repeated or left out, as in beam search.

        Pages are shared, and copied when a row writes into one; a cache without pages copies its rows.

        Args:
            rows: int64 `(new batch,)`.

        Raises:
            ValueError: where rows are not indices of batch rows.
        """
        other = self.fork(rows)
        if self._pages is not None:
            self._pages.release()
        self.__dict__.update(other.__dict__)
        other._pages = None

    def fork(self, rows: Tensor | Sequence[int] | None = None) -> KVCache:
        """A cache that goes on from here by itself; with pages the two share what they hold.

        Args:
            rows: int64 `(new batch,)`, the batch rows that it gets, as in `reorder`. Default all.

        Raises:
            ValueError: where rows are not indices of batch rows.

        Example:
            >>> prompt = KVCache(page_size=64)
            >>> _ = prompt.append(torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100, 8))
            >>> answers = prompt.fork([0] * 8)  # eight answers to one prompt
            >>> answers.batch, answers.pages_used  # no page more
            (8, 2)
        """
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other._strip, other._pages = Strip(self.first), None
        if self._shape is None:
            return other
        batch = self._shape[0]
        index = torch.arange(batch) if rows is None else torch.as_tensor(rows)
        if (
            index.dim() != 1
            or index.is_floating_point()
            or index.dtype == torch.bool
            or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < batch)
        ):
            raise ValueError(
                f"KVCache: rows must be indices of the {batch} batch rows; got {rows!r}. Give one for each new row."
            )
        index = index.long()
        other._shape = (len(index), *self._shape[1:])
        if self._lengths is not None:
            other._lengths = self._lengths[index]
            other._position = int(other._lengths.max()) if len(index) else 0
        if self._pages is not None:
            other._pages = self._pages.select(index.tolist())
        else:
            other._strip = self._strip.select(index)
        return other

    @property
    def pages_used(self) -> int:
        """Pages held by this cache and all that were forked from it or it from; 0 without pages."""
        return 0 if self._pool is None else self._pool.used

    def __del__(self) -> None:
        if getattr(self, "_pages", None) is not None:
            self._pages.release()  # type: ignore[union-attr]

    @property
    def kept(self) -> int:
        """Keys held that the next append keeps."""
        held = len(self)
        if self.left is None:
            return held
        if self.first and not self._strip.broken:
            return held if held - self.left <= self.first else self.first + self.left
        return min(held, self.first + self.left)

    def _check_like(self, k: Tensor, v: Tensor) -> None:
        if self._shape is None:
            return
        batch, num_kv_heads, head_dim, head_dim_v = self._shape
        for name, new, dim in (("k", k, head_dim), ("v", v, head_dim_v)):
            if (*new.shape[:2], new.shape[3]) != (batch, num_kv_heads, dim):
                own = (batch, num_kv_heads, "new", dim)
                raise ValueError(
                    f"KVCache.append: {name} must be {own} like what is held; got {tuple(new.shape)}. "
                    "Use a cache per layer and batch."
                )
            if new.dtype != self._dtype:
                raise TypeError(
                    f"KVCache.append: {name} must be {self._dtype} like what is held; got {new.dtype}. Convert it."
                )

    def _check_counts(self, counts: Tensor, batch: int, new: int) -> None:
        if self.left is not None:
            raise ValueError(
                f"KVCache: rows with lengths of their own must not meet left; got left={self.left}. Use page_size, or "
                "a cache per row."
            )
        fits = isinstance(counts, Tensor) and counts.dtype == torch.int64 and counts.shape == (batch,)
        if not fits or (batch and not 0 <= int(counts.min()) <= int(counts.max()) <= new):
            raise ValueError(
                f"KVCache: counts must be int64 (batch,) = ({batch},), each from 0 to the {new} new tokens; got "
                f"{counts!r}. Count each row's own tokens."
            )


@dataclass(frozen=True, eq=False)
class Taking:
    """A cache about to take in a number of tokens of each row; made by `KVCache.taking`."""

    cache: KVCache
    counts: Tensor
