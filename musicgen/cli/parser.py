"""Command-line parsing: subcommands, options, help texts. Checks types only; does not import torch."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, get_args

from musicgen import __version__
from musicgen.cli import plugins
from musicgen.cli.options import DEFAULT_EXTEND_STRIDE_S, FORMATS, STRATEGIES
from musicgen.config import WeightDtype

ABOUT = """\
Generate music from text and melodies with MusicGen models.

Quick start:
  musicgen generate "happy rock"                generate music with the bundled demo model
  musicgen generate "sad jazz" --melody tune.mp3
  musicgen models                               list available models and their licences
  musicgen doctor                               show devices and the kernel backends in use
"""

GENERATE = """\
Generate music from text prompts, melodies or an audio prompt, or unconditionally.

Each prompt yields one piece in one file. Progress is shown on stderr; each finished file is listed on stdout.
"""

EXAMPLES = """\
examples:
  two pieces from text, 8 seconds each, reproducible
    musicgen generate "happy rock" "sad jazz" --duration 8 --seed 7 -o out/
  the same two prompts, both following one melody
    musicgen generate "happy rock" "sad jazz" --melody tune.mp3
  a melody for each prompt, with Meta's model (downloaded once; its weights are for non-commercial use)
    musicgen generate "rock" "jazz" --melody one.mp3 --melody two.mp3 --model melody
  melody only, three variations
    musicgen generate --melody tune.mp3 --num-samples 3
  continue a recording to a total of 20 seconds
    musicgen generate "sad jazz" --prompt-audio begin.wav --duration 20
  two unconditional pieces
    musicgen generate --unconditional 2
  one piece for each line of a file
    musicgen generate - < prompts.txt
  one piece in a file of your choice, or on stdout
    musicgen generate "happy rock" -o rock.mp3
    musicgen generate "happy rock" -o - | ffplay -
  for scripts: the last line on stdout is JSON
    musicgen generate "happy rock" --json | tail -n 1
"""


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line, like all other errors of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"musicgen: error: {message}; see `{self.prog} --help`\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """`command`, or None, and the options of that subcommand. Exits for `--help`, `--version` and errors."""
    parser, commands = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands:
        parser.error(_unknown_command(arguments[0], list(commands)))
    namespace, unknown = parser.parse_known_args(arguments)
    if namespace.command is None:
        parser.print_help()
    elif unknown:
        commands[namespace.command].error(f"unknown arguments: {' '.join(unknown)}")
    return namespace


def _unknown_command(given: str, commands: list[str]) -> str:
    similar = get_close_matches(given, commands, n=1)
    meant = similar[0] if similar else f"generate {shlex.quote(given)}"
    return f"COMMAND: expected one of {', '.join(commands)}, got {given!r}; try `musicgen {meant}`"


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The top-level parser and those of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="musicgen", description=ABOUT, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"musicgen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    generate = commands.add_parser(
        "generate",
        help="generate music",
        description=GENERATE,
        epilog=EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
        usage="musicgen generate [PROMPT ...] [options]",
    )
    _add_inputs(generate)
    _add_sampling(generate)
    _add_model(generate)
    _add_outputs(generate)
    models = commands.add_parser(
        "models",
        help="list models, their sizes and licences",
        description="List the models that have a short name. --model also accepts any Hugging Face repository of a "
        "MusicGen model and any local folder in Hugging Face or audiocraft layout.",
    )
    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and selected kernel backends",
        description="Show versions, devices and the selected kernel backends with the reasons. Changes nothing.",
    )
    for command in (models, doctor):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    for name, plugin in plugins.commands().items():
        plugin_parser = commands.add_parser(
            name, help=plugin.help, description=plugin.description, formatter_class=raw, allow_abbrev=False
        )
        plugin.add_arguments(plugin_parser)
    return parser, commands.choices


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inputs")
    add = group.add_argument
    add(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="text prompt; quote each one; - reads prompts from stdin, one per line",
    )
    add(
        "--melody",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="condition on the melody of this recording; give once for all prompts, or once per prompt",
    )
    add("--stems", action="store_true", help="remove drums and bass from the melodies first (requires demucs)")
    add(
        "--prompt-audio",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="continue this recording; give once for all prompts, or once per prompt; may be combined with --melody",
    )
    add("--unconditional", type=int, metavar="N", help="generate N unconditional pieces, instead of prompts")
    add(
        "--duration",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="length of each piece, including --prompt-audio (default: %(default)g)",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="pieces per prompt (default: %(default)s)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="base seed; the n-th piece uses N+n−1 (default: random, printed)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="sampling temperature; higher is more varied (default: 1)",
    )
    add(
        "--top-k", type=int, default=250, metavar="N", help="sample from the N most likely codes; 0: all (default: 250)"
    )
    add(
        "--top-p",
        type=float,
        default=0.0,
        metavar="X",
        help="nucleus sampling with this cumulative probability; overrides --top-k (default: off)",
    )
    add("--greedy", action="store_true", help="always take the most likely code (deterministic, often repetitive)")
    add("--guidance", type=float, default=3.0, metavar="X", help="classifier-free guidance scale (default: 3)")
    add(
        "--melody-guidance",
        type=float,
        metavar="X",
        help="double guidance with --melody: scale of the text relative to the melody (audiocraft's cfg_coef_beta)",
    )
    add(
        "--extend-stride",
        type=float,
        default=DEFAULT_EXTEND_STRIDE_S,
        metavar="SECONDS",
        help="seconds between window starts for pieces beyond the model's window of 30 s (default: %(default)g)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and device")
    add = group.add_argument
    add(
        "--model",
        default="",
        metavar="NAME",
        help="a name from `musicgen models`, a Hugging Face repository or a local folder; NAME@REVISION selects a "
        "branch, tag or commit (default: the bundled demo model; with --server, the first model of the service)",
    )
    add("--device", metavar="NAME", help="torch device, e.g. cpu or cuda (default: the GPU if available)")
    add("--weights", choices=get_args(WeightDtype), help="weight type (default: bfloat16 on a GPU, float32 on the CPU)")
    hidden = argparse.SUPPRESS
    add(
        "--dtype", dest="weights", choices=get_args(WeightDtype), default=hidden, help=hidden
    )  # its name in earlier versions
    add("--threads", type=int, metavar="N", help="number of CPU threads (default: one per core)")
    add(
        "--server",
        metavar="URL",
        help="generate on a service: http://host:8000 or grpc://host:9000 (API key from MUSICGEN_API_KEY)",
    )
    add("--batch", type=int, default=8, metavar="N", help="pieces generated concurrently (default: %(default)s)")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("out"),
        metavar="PATH",
        help="output folder; or, for a single piece, a file such as song.mp3, or - for stdout (default: out)",
    )
    add("--format", choices=FORMATS, help="audio file format (default: the suffix of -o, or wav)")
    add("--strategy", choices=STRATEGIES, default="loudness", help="level normalisation (default: loudness)")
    add("--loudness", type=float, metavar="LUFS", help="target loudness for --strategy loudness (default: -14)")
    add(
        "--no-compressor",
        dest="compressor",
        action="store_false",
        help="with --strategy loudness: clip peaks instead of compressing them (exact loudness, but may distort)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="overwrite existing files (default: append a number in a folder, refuse a file given with -o)",
    )
    add("--plot", action="store_true", help="also plot the waveform and spectrogram of each file to a PNG")
    add("--json", action="store_true", help="print a JSON summary as the last line")
    add("--quiet", action="store_true", help="list only the files: no progress, header or summary")
