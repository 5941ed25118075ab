"""What can be typed after `musicgen`: names, defaults, help. Checks nothing but the types, and imports no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from musicgen import __version__
from musicgen.cli import plugins

FORMATS = ("wav", "flac", "mp3", "ogg", "opus")
STRATEGIES = ("loudness", "peak", "rms", "clip")
Strategy = Literal["loudness", "peak", "rms", "clip"]
Dtype = Literal["float32", "bfloat16", "int8", "int4"]
DTYPES = ("float32", "bfloat16", "int8", "int4")
DEFAULT_LOUDNESS_LUFS = -14.0

ABOUT = """\
Text and melody to music, with MusicGen models.

Start here:
  musicgen generate "happy rock"                two words to music, with the small model that comes along
  musicgen generate "sad jazz" --melody tune.mp3
  musicgen models                               what other models there are, and their licences
  musicgen doctor                               what this machine offers and what is used of it
"""

GENERATE = """\
Make music from text, from melodies, from the beginning of a recording, or from nothing.

Each prompt is one piece and one file. The bar on stderr shows the progress; each finished file gets a line.
"""

EXAMPLES = """\
examples:
  two pieces from text, 8 seconds each, reproducible
    musicgen generate "happy rock" "sad jazz" --duration 8 --seed 7 -o out/
  the same two prompts, both following one melody
    musicgen generate "happy rock" "sad jazz" --melody tune.mp3
  a melody for each prompt, with Meta's model (downloaded once; its weights are for non-commercial use)
    musicgen generate "rock" "jazz" --melody one.mp3 --melody two.mp3 --model melody
  a melody without words; three tries
    musicgen generate --melody tune.mp3 --num-samples 3
  go on where a recording ends: 20 seconds, the recording included
    musicgen generate "sad jazz" --prompt-audio begin.wav --duration 20
  two pieces from nothing
    musicgen generate --unconditional 2
  for scripts: the last line on stdout is JSON
    musicgen generate "happy rock" --json | tail -n 1
"""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """`musicgen generate` as it was typed. Set by the command line alone; checked by `plan` and the API."""

    prompts: list[str]
    melody: list[Path]
    stems: bool
    prompt_audio: list[Path]
    unconditional: int | None
    model: str
    """Empty: the default, which depends on whether there is a server."""
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
    dtype: Dtype | None
    threads: int | None
    batch: int
    out: Path
    format: str
    strategy: Strategy
    loudness: float | None
    overwrite: bool
    plot: bool
    json: bool
    server: str | None


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"musicgen: error: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; each namespace holds `command` and the fields of that command's options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="musicgen", description=ABOUT, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"musicgen {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    generate = commands.add_parser(
        "generate",
        help="make music",
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
        help="list the models, their sizes and licences",
        description="List the models that have a short name. Any Hugging Face repository of a MusicGen model and any "
        "local folder, in Hugging Face or audiocraft layout, works as --model too.",
    )
    doctor = commands.add_parser(
        "doctor",
        help="show versions, devices and the backends that would be used, and why",
        description="Show versions, devices and the kernel backends that would be used, and why. Changes nothing.",
    )
    for command in (models, doctor):
        command.add_argument("--json", action="store_true", help="print JSON instead of text")
    for name, plugin in plugins.commands().items():
        plugin_parser = commands.add_parser(
            name, help=plugin.help, description=plugin.description, formatter_class=raw, allow_abbrev=False
        )
        plugin.add_arguments(plugin_parser)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="what it should sound like; quote each prompt")
    add(
        "--melody",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="follow the melody of this recording; once for all prompts, or repeated, one for each prompt",
    )
    add("--stems", action="store_true", help="take drums and bass out of the melodies first (needs demucs)")
    add(
        "--prompt-audio",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="begin with this recording and go on; once for all prompts or one for each; goes with --melody too",
    )
    add("--unconditional", type=int, metavar="N", help="N pieces from nothing, instead of prompts")
    add(
        "--duration",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="length of each piece, a --prompt-audio included (default: %(default)g)",
    )
    add("--num-samples", type=int, default=1, metavar="N", help="pieces for each prompt (default: %(default)s)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="the n-th file uses seed N+n−1 and is the same each time (default: drawn, and printed)",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to choose")
    add = group.add_argument
    add("--temperature", type=float, default=1.0, metavar="X", help="above 1 bolder, below safer (default: 1)")
    add("--top-k", type=int, default=250, metavar="N", help="draw from the N likeliest codes; 0: all (default: 250)")
    add("--top-p", type=float, default=0.0, metavar="X", help="draw from the likeliest codes up to this mass instead")
    add("--greedy", action="store_true", help="take the likeliest code at every step: no chance, often dull")
    add("--guidance", type=float, default=3.0, metavar="X", help="how closely to follow the prompt (default: 3)")
    add(
        "--melody-guidance",
        type=float,
        metavar="X",
        help="with --melody: how much more closely to follow the text than the melody (audiocraft's cfg_coef_beta)",
    )
    add(
        "--extend-stride",
        type=float,
        default=18.0,
        metavar="SECONDS",
        help="beyond the model's 30 s: seconds by which each window moves on (default: %(default)g)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which model, where")
    add = group.add_argument
    add(
        "--model",
        default="",
        metavar="NAME",
        help="a name from `musicgen models`, a Hugging Face repository or a local folder (default: demo, which "
        "comes with the package; with --server the first that the service has)",
    )
    add("--device", metavar="NAME", help="such as cpu or cuda (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, help="of the decoder's weights (default: bfloat16 on a GPU, float32 on the CPU)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="processor threads (default: one a core)",
    )

    add(
        "--server",
        metavar="URL",
        help="let a service make it: http://host:8000 or grpc://host:9000 (an API key is taken from MUSICGEN_API_KEY)",
    )
    add("--batch", type=int, default=8, metavar="N", help="pieces made at the same time (default: %(default)s)")


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to write")
    add = group.add_argument
    add("-o", "--out", type=Path, default=Path("out"), metavar="FOLDER", help="folder for the files (default: out)")
    add("--format", choices=FORMATS, default="wav", help="of the audio files (default: wav)")
    add("--strategy", choices=STRATEGIES, default="loudness", help="how to set the level (default: loudness)")
    add("--loudness", type=float, metavar="LUFS", help="target of --strategy loudness (default: -14)")
    add("--overwrite", action="store_true", help="replace files of the same name (default: number the new ones)")
    add("--plot", action="store_true", help="also write a picture (waveform and spectrogram) of each file")
    add("--json", action="store_true", help="print a JSON summary as the last line")
