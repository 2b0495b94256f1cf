"""Keys and values in pages that rows and caches may share: counted references, copied before the first write.

Enters: what `KVCache` has checked: tensors (batch, num_kv_heads, new, columns) of one or more kinds, counts a row.
Leaves: the pool of pages and the table that says which page holds which tokens of which row.
Floor 1. PagedAttention (Kwon et al. 2023), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PagePool:
    """Pages of `page_size` tokens, at most `max_pages` of them, each held by as many as its count says."""

    def __init__(self, page_size: int, max_pages: int) -> None:
        self.page_size, self.max_pages = page_size, max_pages
        self.buffers: list[Tensor] = []  # one of each kind: (pages, num_kv_heads, page_size, columns)
        self._counts: list[int] = []
        self._free: list[int] = []

    @property
    def left(self) -> int:
        """Pages that can still be taken."""
        return self.max_pages - len(self._counts) + len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return len(self._counts) - len(self._free)

    def count(self, page: int) -> int:
        """How many hold a page."""
        return self._counts[page]

    def take(self, like: Sequence[Tensor]) -> int:
        """A page that nobody holds; `like` are tensors of each kind."""
        if not self._free:
            self.prepare(like)
        page = self._free.pop()
        self._counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holds the page."""
        self._check(page, "shared")
        self._counts[page] += 1

    def release(self, page: int) -> None:
        """One holds the page no longer."""
        self._check(page, "freed")
        self._counts[page] -= 1
        if self._counts[page] == 0:
            self._free.append(page)

    def copied(self, page: int) -> int:
        """A page of one's own in place of a shared one."""
        own = self.take(self.buffers)
        for buffer in self.buffers:
            buffer[own] = buffer[page]
        self.release(page)
        return own

    def _check(self, page: int, what: str) -> None:
        if not 0 <= page < len(self._counts) or self._counts[page] == 0:
            raise ValueError(
                f"KVCache: a page must be held to be {what}; got page {page}, which nobody holds. "
                "Free each page once, and share it before."
            )

    def prepare(self, like: Sequence[Tensor]) -> None:
        """Memory for twice as many pages, or the first ones."""
        have = len(self._counts)
        pages = min(self.max_pages, max(8, 2 * have))
        assert pages > have, "the caller has asked for more than `left`"
        with torch.inference_mode(False):  # see Strip
            grown = [
                torch.empty(pages, t.shape[1], self.page_size, t.shape[3], dtype=t.dtype, device=t.device) for t in like
            ]
        for new, old in zip(grown, self.buffers, strict=False):
            new[:have] = old
        self.buffers = grown
        self._counts += [0] * (pages - have)
        self._free += range(pages - 1, have - 1, -1)


class Paged:
    """The pages of each batch row, in order."""

    def __init__(self, pool: PagePool, rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        self.pool = pool
        self.rows = [list(pages) for pages in rows]
        self.lengths = list(lengths)
        self._table: Tensor | None = None

    def needed(self, counts: Sequence[int]) -> int:
        """Pages that `append` would take."""
        size, total = self.pool.page_size, 0
        after: dict[int, int] = {}  # holders of the shared last pages that have not written yet
        for pages, length, count in zip(self.rows, self.lengths, counts, strict=True):
            if not count:
                continue
            total += -(-(length + count) // size) - len(pages)
            if length % size:
                holders = after.get(pages[-1], self.pool.count(pages[-1]))
                total += holders > 1
                after[pages[-1]] = holders - 1
        return total

    def append(self, new: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Put the first counts[b] tokens of row b behind its last; pages shared with others are copied before."""
        if not self.pool.buffers:
            self.pool.prepare(new)
        size = self.pool.page_size
        at: list[tuple[int, int, int, int]] = []
        for row, count in enumerate(counts):
            if not count:
                continue
            pages, length = self.rows[row], self.lengths[row]
            if length % size and self.pool.count(pages[-1]) > 1:
                pages[-1] = self.pool.copied(pages[-1])
                self._table = None
            while len(pages) * size < length + count:
                pages.append(self.pool.take(new))
                self._table = None
            self.lengths[row] += count
            at += [(pages[p // size], p % size, row, p - length) for p in range(length, length + count)]
        if at:
            page, slot, row, token = torch.tensor(at).unbind(1)
            for buffer, rows in zip(self.pool.buffers, new, strict=True):
                buffer.transpose(1, 2)[page, slot] = rows.transpose(1, 2)[row, token]

    def table(self) -> Tensor:
        """int32 (batch, pages), rows with fewer pages filled up with page 0, of which no query sees anything."""
        if self._table is None:
            most = max(map(len, self.rows), default=0)
            self._table = torch.tensor(
                [pages + [0] * (most - len(pages)) for pages in self.rows], dtype=torch.int32
            ).reshape(len(self.rows), most)
        return self._table

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of each row."""
        for row, length in enumerate(lengths):
            while len(self.rows[row]) > -(-length // self.pool.page_size):
                self.pool.release(self.rows[row].pop())
                self._table = None
            self.lengths[row] = length

    def select(self, rows: Sequence[int]) -> Paged:
        """The batch rows `rows`, sharing their pages."""
        for row in rows:
            for page in self.rows[row]:
                self.pool.share(page)
        return Paged(self.pool, [self.rows[row] for row in rows], [self.lengths[row] for row in rows])

    def release(self) -> None:
        """Let go of every page."""
        self.crop([0] * len(self.rows))
