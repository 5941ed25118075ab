"""The Accept header → the form of a response. Whatever it does not decide is left to the fields of the request."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers

_JSON = "application/json"
_FORMATS = {"audio/wav": "wav", "audio/flac": "flac", "audio/mpeg": "mp3", "audio/ogg": "ogg", "audio/pcm": "pcm16"}


@dataclass(frozen=True, slots=True)
class Accepted:
    """Set by `accepted`."""

    wants_json: bool
    response_format: str | None
    """The preferred audio format; None: any."""


def accepted(headers: Headers) -> Accepted:
    """What a request prefers by `q`, the first one of equals; JSON also wins over audio of the same preference."""
    weights = dict(_weighted(entry) for entry in ",".join(headers.getlist("accept")).split(","))
    weights = {kind: weight for kind, weight in weights.items() if weight > 0}
    audio = {kind: weight for kind, weight in weights.items() if kind.startswith("audio/")}
    best = max(audio, key=lambda kind: audio[kind], default="")
    wants_json = weights.get(_JSON, 0.0) >= audio.get(best, 0.0) and _JSON in weights
    return Accepted(wants_json, _FORMATS.get(best))


def _weighted(entry: str) -> tuple[str, float]:
    kind, *parameters = (part.strip().lower() for part in entry.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return kind, _number(value)
    return kind, 1.0


def _number(text: str) -> float:
    """A malformed weight is that of an entry without one."""
    try:
        return float(text)
    except ValueError:
        return 1.0
