"""Usage log: one line per ended request, and counters to verify the gatekeeper's consistency.

Owns the usage file and the counters. Only the number of lost lines is exported as a metric: request metrics come from
the ingresses (`request_metrics`). Contains no prompts and no keys.
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
"""Tenant class and model name: the labels of every counter."""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """Usage of one admitted request. Set by the gatekeeper."""

    request_id: str
    tenant: str
    tenant_class: str
    model: str
    reason: FinishReason
    asked_s: float
    """Requested seconds of audio."""
    billed_s: float
    """Billed seconds of audio."""
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
        """One line, without the newline. `time`: seconds since the epoch."""
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
    """All counters since the start. Keys start with the tenant class and the model."""

    admitted: dict[TenantModel, int]
    finished: dict[TenantModel, int]
    cancelled: dict[TenantModel, int]
    failed: dict[TenantModel, int]
    rejected: dict[tuple[str, str, str], int]
    """Third: the error code, as in `errors.report`."""
    running_by: dict[TenantModel, int]
    running: int
    models: dict[str, ModelLoad]
    num_lines_lost: int


class Ledger:
    """Request counters, and the usage file.

    Args:
        file: lines are appended to it; None: counters only.

    Raises:
        InvalidRequestError: the file cannot be written.
    """

    def __init__(self, file: Path | None) -> None:
        self.admitted: Counter[TenantModel] = Counter()
        self.ended: Counter[tuple[str, str, str]] = Counter()
        """By tenant class, model and value of the `FinishReason`."""
        self.rejected: Counter[tuple[str, str, str]] = Counter()
        """By tenant class, model and error code."""
        self.num_lines_lost = 0
        """Lines that could not be written, e.g. because the disk is full."""
        self._file = None if file is None else _open(file)

    def admit(self, tenant_class: str, model: str) -> None:
        self.admitted[tenant_class, model] += 1

    def reject(self, tenant_class: str, model: str, code: str) -> None:
        self.rejected[tenant_class, model, code] += 1

    def end(self, line: UsageLine, time: float) -> None:
        """An admitted request has ended at `time`, in seconds since the epoch. Writes and flushes its line."""
        self.ended[line.tenant_class, line.model, line.reason.value] += 1
        if self._file is None:
            return
        try:
            self._file.write(line.to_json(time) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            self.num_lines_lost += 1
            log.error("request %s: usage line could not be written: %s", line.request_id, type(error).__name__)

    def num_running(self) -> Counter[TenantModel]:
        """Admitted requests that have not ended."""
        running = self.admitted.copy()
        for (tenant_class, model, _), count in self.ended.items():
            running[tenant_class, model] -= count
        return running

    def counts(self, models: dict[str, ModelLoad]) -> Counts:
        """A copy of all counters, with the load of each model."""

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
        """Check admitted = finished + cancelled + failed + running, for each tenant class and model.

        Args:
            running: running requests, counted independently.

        Raises:
            RuntimeError: it does not hold.
        """
        expected = self.num_running()
        if {key: count for key, count in expected.items() if count} != dict(+running):
            raise RuntimeError(f"running requests: the ledger has {dict(expected)}, the registry {dict(running)}")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _open(path: Path) -> IO[str]:
    """Open the file for appending; starts a new line after one truncated by a crash."""
    try:
        file = path.open("a", encoding="utf-8")
        with path.open("rb") as old:
            if old.seek(0, 2) and old.seek(-1, 2) >= 0 and old.read(1) != b"\n":
                file.write("\n")
    except OSError as error:
        raise InvalidRequestError(
            "a writable file", f"{path} ({type(error).__name__})", param="access.usage_file"
        ) from error
    return file


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
