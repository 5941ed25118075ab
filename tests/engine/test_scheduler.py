"""Admission, the order of admission, and what a step holds: the promises that no page is ever missing."""

from __future__ import annotations

from engine_fakes import codes_request, new_core, run_all

from musicgen.types import EngineRequest


def test_a_shared_page_is_not_counted_as_freed_when_its_first_holder_ends() -> None:
    """`second` shares the prefix of `first`, which ends soon; its pages stay, beside the growing `other`.

    At the end 7 + 3 pages are needed: `second` has to wait for `other` where there are 9.
    """
    core = new_core(9, max_rows=8)
    core.add(EngineRequest("first", codes_request(2, num_rows=1, text=1, text_len=62)))
    core.add(EngineRequest("other", codes_request(40, num_rows=1, text=2, text_len=1)))
    core.step()
    core.add(EngineRequest("second", codes_request(40, num_rows=1, text=1, text_len=62)))
    assert len(run_all(core).ends) == 3
