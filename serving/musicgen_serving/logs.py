"""Structured logs: one JSON object per line, with the request id. No prompts unless enabled."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

LOGGERS = ("musicgen", "musicgen_serving")
FIELDS = ("request_id", "model", "tenant_class", "reason", "code", "audio_s", "total_s", "first_audio_s", "prompts")
"""Extra fields of a line: `logger.info(..., extra={...})`."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "part": self._part,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, part: str) -> None:
    """Log to standard error, which Ray redirects to its log files."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(part))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
