"""Page allocator of the KV cache: reference counts, prefix sharing, and caching of unreferenced pages.

A page holds 16 positions of one row. Full pages with equal content are shared: each is published under a key that
identifies everything up to and including it. Unreferenced pages stay in the cache until their space is needed (LRU).
The allocator works with page numbers and keys only, not with tensors or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from musicgen_kernels import PAGE_LEN

PageKey = bytes


def num_pages_for(num_positions: int) -> int:
    """Number of pages for `num_positions` positions of one row."""
    return -(-num_positions // PAGE_LEN)


def page_keys(contents: Sequence[bytes]) -> list[PageKey]:
    """The keys of consecutive pages: each identifies its own content and everything before it."""
    keys: list[PageKey] = []
    parent = b""
    for content in contents:
        parent = blake2b(content, digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys


class OutOfPagesError(RuntimeError):
    """More pages were requested than are available: a bug in the scheduler's forecast."""


class PageAllocator:
    """Pages 0 … `num_pages` − 1: each is free, held by one or more rows, or kept (published, but not held).

    The most recently freed page is allocated first: on the CPU, pages that were never used take no memory.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._num_holders = [0] * num_pages
        self._page_of: dict[PageKey, int] = {}
        self._key_of: dict[int, PageKey] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can return, including kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Allocate pages with one holder each.

        Raises:
            OutOfPagesError: not enough pages are available; none is allocated.
        """
        if num_pages > self.num_available:
            raise OutOfPagesError(f"expected {num_pages} pages, got {self.num_available} available")
        pages = []
        for _ in range(num_pages):
            page = self._free.pop() if self._free else self._evict()
            self._num_holders[page] = 1
            pages.append(page)
        return pages

    def grow(self, num_pages: int) -> None:
        """Increase the number of pages."""
        self._free[:0] = reversed(range(self.num_pages, num_pages))
        self._num_holders += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def find(self, key: PageKey) -> int | None:
        """The page published under `key`, or None. No side effects."""
        return self._page_of.get(key)

    def share(self, page: int) -> None:
        """Add a holder to a page that is held or kept."""
        assert self._num_holders[page] > 0 or page in self._kept
        self._kept.pop(page, None)
        self._num_holders[page] += 1

    def touch(self, page: int) -> None:
        """Mark a kept page as most recently used."""
        if page in self._kept:
            self._kept.move_to_end(page)

    def publish(self, page: int, key: PageKey) -> None:
        """Make a computed page available for sharing. The first page published under a key stays."""
        assert self._num_holders[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Iterable[int]) -> None:
        """Remove one holder from each page."""
        for page in pages:
            assert self._num_holders[page] > 0, f"expected a held page, got page {page}, which was freed twice"
            self._num_holders[page] -= 1
            if self._num_holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Assert that the reference counts match the page tables of all holders."""
        counted = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counted[page] += 1
        assert counted == self._num_holders, "page holders do not match the page tables"
        assert len(self._free) + len(self._kept) + sum(1 for n in counted if n) == self.num_pages
        assert all(counted[page] == 0 for page in (*self._free, *self._kept))
        assert all(self._page_of[key] == page for page, key in self._key_of.items())
        assert len(self._page_of) == len(self._key_of)
        assert set(self._kept) <= set(self._key_of)
