"""The bytes of one edge: shares come back, a request alone is always taken."""

from __future__ import annotations

import pytest
from musicgen_serving.budget import Budget

from musicgen.errors import OverloadedError


def test_what_is_too_much_together_is_refused_until_there_is_room() -> None:
    budget = Budget(lambda: 100)
    with budget.share(60):
        with pytest.raises(OverloadedError) as refused, budget.share(41):
            pass
        assert refused.value.retry_after_s
        with budget.share(10) as other:
            other.take(30)
            with pytest.raises(OverloadedError):
                other.take(1)
            assert (budget.held, other.held) == (100, 40)
    assert budget.held == 0
    with budget.share(41):
        pass


def test_a_request_alone_is_taken_whatever_its_size() -> None:
    budget = Budget(lambda: 100)
    with budget.share(300) as share:
        share.take(300)
    assert budget.held == 0
