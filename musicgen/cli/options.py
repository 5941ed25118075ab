"""The options of `musicgen generate` as data: types, defaults, names in errors. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from musicgen.config import WeightDtype
from musicgen.errors import InvalidRequestError

FORMATS = ("wav", "flac", "mp3", "ogg", "opus")
DEFAULT_FORMAT = "wav"
STDIN, STDOUT = "-", Path("-")
STRATEGIES = ("loudness", "peak", "rms", "clip")
Strategy = Literal["loudness", "peak", "rms", "clip"]
DEFAULT_LOUDNESS_LUFS = -14.0
DEFAULT_EXTEND_STRIDE_S = 18.0


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of `musicgen generate`, as parsed. Validated by `plan`, `checks` and the API."""

    prompts: list[str]
    melody: list[Path]
    stems: bool
    prompt_audio: list[Path]
    unconditional: int | None
    model: str
    """Empty: the default, which depends on `server`."""
    duration: float
    seed: int | None
    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    greedy: bool
    guidance: float
    melody_guidance: float | None
    extend_stride: float
    device: str | None
    weights: WeightDtype | None
    threads: int | None
    batch: int
    out: Path
    format: str | None
    """None: the suffix of `out`, or the default."""
    strategy: Strategy
    loudness: float | None
    compressor: bool
    overwrite: bool
    plot: bool
    json: bool
    quiet: bool
    server: str | None

    @property
    def to_stdout(self) -> bool:
        return self.out == STDOUT


_OPTIONS = {
    "cfg_coef": "guidance",
    "cfg_coef_beta": "melody-guidance",
    "guidance_scale": "guidance",
    "stem_name": "out",
    "url": "server",
}
"""Options of parameters with another name."""


def by_option(error: InvalidRequestError) -> InvalidRequestError:
    """The error with the option in place of the parameter that the library or the service names, if it has one."""
    param = error.param or ""
    option = _OPTIONS.get(param, param.removesuffix("_s").replace("_", "-"))
    if option.replace("-", "_") not in GenerateOptions.__dataclass_fields__:
        return error
    return InvalidRequestError(error.expected, error.got, error.hint, param=f"--{option}")
