"""Equal prefixes are computed once: samples of one prompt, null rows of a text length, prompts that come again."""

from __future__ import annotations

import numpy as np
import pytest
from engine.fakes import NUM_CHROMA_FRAMES, alone, codes_request, new_core, run_all
from musicgen_kernels import PAGE_LEN

from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.core import EngineCore
from musicgen.engine.kv_cache import PageAllocator, page_keys
from musicgen.types import EngineRequest

TEXT_LEN = 45
PREFIX_LEN = NUM_CHROMA_FRAMES + TEXT_LEN
NUM_FULL = PREFIX_LEN // PAGE_LEN


class Prefilled:
    """Counts the positions of prefixes that a core computes."""

    def __init__(self, core: EngineCore) -> None:
        self.count = 0
        run = core.runner.run

        def counted(batch: ScheduledBatch) -> np.ndarray:
            for chunk in batch.chunks:
                self.count += max(0, min(chunk.end, chunk.sequence.prefix_len) - chunk.start)
            return run(batch)

        core.runner.run = counted  # type: ignore[method-assign]

    def of(self, core: EngineCore, *requests: EngineRequest) -> int:
        before = self.count
        for request in requests:
            core.add(request)
        run_all(core)
        return self.count - before


def test_samples_of_one_prompt_share_their_prefix() -> None:
    """At the same time: full pages are one another's, the part page behind them is copied; the codes are their own."""
    core = new_core()
    prefilled = Prefilled(core)
    for seed in range(4):
        core.add(EngineRequest(str(seed), codes_request(40, text_len=TEXT_LEN, seed=seed)))
    core.step()
    core.step()
    running = core.scheduler.running
    assert len(running) == 4
    for index in range(2):
        assert len({tuple(sequence.rows[index].pages[:NUM_FULL]) for sequence in running}) == 1
        assert len({sequence.rows[index].pages[NUM_FULL] for sequence in running}) == 4
    listener = run_all(core)
    assert prefilled.count == 2 * PREFIX_LEN
    for seed in range(4):
        assert listener.codes(str(seed)).equal(alone(codes_request(40, text_len=TEXT_LEN, seed=seed)))


def test_null_rows_of_a_text_length_share_their_prefix() -> None:
    core = new_core()
    prefilled = Prefilled(core)
    assert prefilled.of(core, EngineRequest("first", codes_request(text=1, text_len=TEXT_LEN))) == 2 * PREFIX_LEN
    assert prefilled.of(core, EngineRequest("other", codes_request(text=2, text_len=TEXT_LEN))) == PREFIX_LEN
    own, null = 5 + PREFIX_LEN, 5 + PREFIX_LEN - NUM_FULL * PAGE_LEN  # longer: as far as pages are equal
    assert prefilled.of(core, EngineRequest("longer", codes_request(text=3, text_len=5 + TEXT_LEN))) == own + null


@pytest.mark.parametrize("again", [True, False])
def test_a_prompt_that_comes_again_is_resident_until_its_pages_are_needed(again: bool) -> None:
    """Two prompts of four pages are kept in ten; the one that was of use last outlives a third one."""
    core = new_core(10)
    prefilled = Prefilled(core)

    def play(text: int) -> int:
        piece = codes_request(5, text=text, text_len=4 * PAGE_LEN - NUM_CHROMA_FRAMES, num_rows=1)
        return prefilled.of(core, EngineRequest("piece", piece))

    assert [play(1), play(2)] == [64, 64]
    if again:
        assert play(1) == 0
    assert play(3) == 64
    kept, gone = (1, 2) if again else (2, 1)
    assert play(kept) == 0
    assert play(gone) > 0


def test_the_page_that_was_of_use_longest_ago_goes_first() -> None:
    allocator = PageAllocator(3)
    keys = page_keys([b"a"]) + page_keys([b"b"]) + page_keys([b"c"])
    pages = allocator.allocate(3)
    for page, key in zip(pages, keys, strict=True):
        allocator.publish(page, key)
    allocator.release(pages)
    allocator.touch(pages[0])
    allocator.share(pages[1])
    allocator.release([pages[1]])
    for gone in (2, 0, 1):
        assert allocator.allocate(1) == [pages[gone]]
        assert allocator.find(keys[gone]) is None
