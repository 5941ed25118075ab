"""Who owns which page: reference counts, sharing of equal prefixes, and pages kept for whoever comes next.

A page holds 16 positions of one row. Pages whose whole content is known to be equal are shared: each is published
under a key that stands for everything up to and including it. A page that nobody holds any more stays findable
until its space is needed (least recently used first). The allocator knows page numbers and keys only, neither
tensors nor requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from musicgen_kernels import PAGE_LEN

PageKey = bytes


def num_pages_for(num_positions: int) -> int:
    """Pages that hold `num_positions` positions of one row."""
    return -(-num_positions // PAGE_LEN)


def page_keys(contents: Sequence[bytes]) -> list[PageKey]:
    """The keys of consecutive pages: each stands for its own content and everything before it."""
    keys: list[PageKey] = []
    parent = b""
    for content in contents:
        parent = blake2b(content, digest_size=16, key=parent).digest()
        keys.append(parent)
    return keys


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free: the scheduler's forecast was wrong."""


class PageAllocator:
    """Pages 0 … `num_pages` − 1: each is free, held by one or more rows, or kept (published and held by nobody).

    The page that was freed last is handed out first: on the CPU, pages that were never used take no memory.
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
        """Pages that `allocate` can hand out, those that are kept included."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def num_holders(self, page: int) -> int:
        return self._num_holders[page]

    def allocate(self, num_pages: int) -> list[int]:
        """Hand out pages with one holder each.

        Raises:
            OutOfPagesError: there are not that many; nothing is handed out.
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
        """Own more pages than before."""
        self._free[:0] = reversed(range(self.num_pages, num_pages))
        self._num_holders += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def find(self, key: PageKey) -> int | None:
        """The page published under `key`, or None. Changes nothing."""
        return self._page_of.get(key)

    def share(self, page: int) -> None:
        """Add a holder to a page that is held or kept."""
        assert self._num_holders[page] > 0 or page in self._kept
        self._kept.pop(page, None)
        self._num_holders[page] += 1

    def touch(self, page: int) -> None:
        """A page that is kept was of use: let it be the last to go."""
        if page in self._kept:
            self._kept.move_to_end(page)

    def publish(self, page: int, key: PageKey) -> None:
        """Let others find a page whose content is computed. The first page under a key stays."""
        assert self._num_holders[page] > 0
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def release(self, pages: Iterable[int]) -> None:
        """Take one holder off each page."""
        for page in pages:
            assert self._num_holders[page] > 0, f"expected a page that is held, got page {page}: it was freed twice"
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
        """Assert that the books agree with the page tables of everyone who holds pages."""
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
