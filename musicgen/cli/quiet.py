"""Library settings for the duration of a command: silenced logging and the number of threads. Restored afterwards.

Download progress is kept, and so are the project's own warnings, one line each on stderr.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from musicgen.cli.options import GenerateOptions

CHATTY_LOGGERS = ("transformers", "huggingface_hub", "torio", "torchaudio", "matplotlib")


class _OneLine(logging.Handler):
    """Prints the project's warnings as single lines on stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"musicgen: {record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress warnings, log records below ERROR, and progress bars for loading weights from disk."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    own, handler = logging.getLogger("musicgen"), _OneLine(logging.WARNING)
    own.addHandler(handler)
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def torch_threads(options: GenerateOptions) -> Iterator[None]:
    """Set the number of torch threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
