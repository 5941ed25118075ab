"""Who used what: one line for each request that ended, and counts to check the gatekeeper's books by.

Owns the usage file and the counts. Of these only the lines that were lost become a metric: requests are counted for
the metrics by the edges (`watch`). Knows no prompt and no key, and decides nothing.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from musicgen.errors import InvalidRequestError
from musicgen.types import FinishReason
from musicgen_serving.admission import Settlement
from musicgen_serving.backlog import ModelLoad

log = logging.getLogger(__name__)

TenantModel = tuple[str, str]
"""Class of the tenant, name of the model: the labels of every count."""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """How one admitted request went. Set by the gatekeeper."""

    request_id: str
    tenant: str
    tenant_class: str
    model: str
    reason: FinishReason
    asked_s: float
    """Seconds of audio asked for."""
    billed_s: float
    """Seconds of audio that count."""
    time_to_first_audio_s: float | None
    total_s: float
    num_failovers: int
    error_code: str | None

    @classmethod
    def of(cls, settlement: Settlement) -> UsageLine:
        progress, ticket = settlement.progress, settlement.progress.ticket
        return cls(
            request_id=ticket.request_id,
            tenant=ticket.tenant,
            tenant_class=ticket.tenant_class,
            model=progress.model,
            reason=settlement.reason,
            asked_s=progress.audio_s,
            billed_s=progress.billed_s,
            time_to_first_audio_s=settlement.time_to_first_audio_s,
            total_s=settlement.total_s,
            num_failovers=settlement.num_failovers,
            error_code=settlement.error_code,
        )

    def to_json(self, time: float) -> str:
        """One line, without its end. `time`: seconds of the epoch."""
        return json.dumps(
            {
                "time": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds"),
                "request_id": self.request_id,
                "tenant": self.tenant,
                "tenant_class": self.tenant_class,
                "model": self.model,
                "reason": self.reason.value,
                "asked_s": round(self.asked_s, 3),
                "billed_s": round(self.billed_s, 3),
                "time_to_first_audio_s": _rounded(self.time_to_first_audio_s),
                "total_s": round(self.total_s, 3),
                "num_failovers": self.num_failovers,
                "error_code": self.error_code,
            }
        )


@dataclass(frozen=True, slots=True)
class Counts:
    """Everything counted since the start. Keys begin with the tenant's class and the model."""

    admitted: dict[TenantModel, int]
    finished: dict[TenantModel, int]
    cancelled: dict[TenantModel, int]
    failed: dict[TenantModel, int]
    rejected: dict[tuple[str, str, str], int]
    """Third: the code of the error, as in `errors.report`."""
    running_by: dict[TenantModel, int]
    running: int
    models: dict[str, ModelLoad]
    num_lines_lost: int


class Ledger:
    """Counts of requests, and the usage file.

    Args:
        file: lines are added to it; None keeps counts only.

    Raises:
        InvalidRequestError: the file cannot be written.
    """

    def __init__(self, file: Path | None) -> None:
        self.admitted: Counter[TenantModel] = Counter()
        self.ended: Counter[tuple[str, str, str]] = Counter()
        """By class, model and value of the `FinishReason`."""
        self.rejected: Counter[tuple[str, str, str]] = Counter()
        """By class, model and code of the error."""
        self.num_lines_lost = 0
        """Lines that could not be written, such as to a full disk."""
        self._file = None if file is None else _open(file)

    def admit(self, tenant_class: str, model: str) -> None:
        self.admitted[tenant_class, model] += 1

    def reject(self, tenant_class: str, model: str, code: str) -> None:
        self.rejected[tenant_class, model, code] += 1

    def end(self, line: UsageLine, time: float) -> None:
        """An admitted request has ended at `time`, in seconds of the epoch. Writes its line through to the system."""
        self.ended[line.tenant_class, line.model, line.reason.value] += 1
        if self._file is None:
            return
        try:
            self._file.write(line.to_json(time) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            self.num_lines_lost += 1
            log.error("request %s: its usage line could not be written: %s", line.request_id, type(error).__name__)

    def num_running(self) -> Counter[TenantModel]:
        """Requests that were admitted and have not ended."""
        running = self.admitted.copy()
        for (tenant_class, model, _), count in self.ended.items():
            running[tenant_class, model] -= count
        return running

    def counts(self, models: dict[str, ModelLoad]) -> Counts:
        """A copy of all counts, with the load of each model beside them."""

        def by(reason: FinishReason) -> dict[TenantModel, int]:
            return {(kind, model): count for (kind, model, value), count in self.ended.items() if value == reason.value}

        return Counts(
            admitted=dict(self.admitted),
            finished=by(FinishReason.FINISHED),
            cancelled=by(FinishReason.CANCELLED),
            failed=by(FinishReason.FAILED),
            rejected=dict(self.rejected),
            running_by=dict(self.num_running()),
            running=sum(self.num_running().values()),
            models=models,
            num_lines_lost=self.num_lines_lost,
        )

    def check(self, running: Counter[TenantModel]) -> None:
        """admitted = finished + cancelled + failed + running, for each class and model.

        Args:
            running: requests that run, counted by someone else.

        Raises:
            RuntimeError: it does not hold.
        """
        expected = self.num_running()
        if {key: count for key, count in expected.items() if count} != dict(+running):
            raise RuntimeError(f"the ledger says that {dict(expected)} run, the registry has {dict(running)}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _open(path: Path) -> IO[str]:
    """The file for appending; after a line that a crash has cut off, a new one is begun."""
    try:
        file = path.open("a", encoding="utf-8")
        with path.open("rb") as old:
            if old.seek(0, 2) and old.seek(-1, 2) >= 0 and old.read(1) != b"\n":
                file.write("\n")
    except OSError as error:
        raise InvalidRequestError(
            "a file that can be written", f"{path} ({type(error).__name__})", param="access.usage_file"
        ) from error
    return file


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
