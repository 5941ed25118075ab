"""Admission, the order of admission, and what a step holds: the promises that no page is ever missing."""

from __future__ import annotations

from engine.fakes import codes_request, new_core, run_all

from musicgen.types import EngineRequest, FinishReason


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


def test_rows_of_one_request_that_share_pages_do_not_keep_it_out() -> None:
    """Without a melody the melody-only row is the null row; once kept, its pages are shared between the two.

    Three rows of 80 positions (5 pages each) fit 15 pages, and must fit again when some of them are the same page.
    """
    core = new_core(15)
    piece = codes_request(70, num_rows=3, text=2, text_len=36)
    for request_id in ("first", "again"):
        core.add(EngineRequest(request_id, piece))
        assert run_all(core, max_steps=500).ends[request_id].reason is FinishReason.FINISHED
