"""Which backend is chosen and why, and that the compiled levels are kept apart."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import musicgen_kernels
import pytest
import torch
from musicgen_kernels import BackendUnavailableError, isa, layer_norm
from musicgen_kernels.backend import ENVIRONMENT, OPERATIONS, choose, report

FOLDER = Path(musicgen_kernels.__file__).parent
EXTENSIONS = sorted(FOLDER.glob("_cpu*.so"))


def test_the_report_names_every_operation_and_a_reason(cpu: str) -> None:
    choices = report()
    assert [choice.operation for choice in choices] == list(OPERATIONS)
    assert {choice.backend for choice in choices} == {"cpu"}
    assert all(choice.reason for choice in choices)


def test_float64_goes_to_the_reference() -> None:
    choice = choose("linear", "cpu", torch.float64, None)
    assert choice.backend == "reference"
    assert "float64" in choice.reason


def test_argument_beats_environment_beats_preference(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "reference, linear=cpu:baseline")
    chosen = {choice.operation: choice.backend for choice in report()}
    assert chosen.pop("linear") == "cpu:baseline"
    assert set(chosen.values()) == {"reference"}
    x = torch.randn(2, 1030)
    parameters = (torch.rand(1030), torch.rand(1030))
    assert torch.equal(layer_norm(x, *parameters), layer_norm(x, *parameters, backend="reference"))
    assert torch.equal(layer_norm(x, *parameters, backend=cpu), layer_norm(x, *parameters, backend=cpu))


@pytest.mark.parametrize("name", ["nonsense", "cpu:sse9", "reference:avx2", "cuda"])
def test_what_cannot_run_says_so(name: str) -> None:
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    x, one = torch.ones(1, 4), torch.ones(4)
    with pytest.raises(BackendUnavailableError, match=name.partition(":")[0]):
        layer_norm(x, one, one, backend=name)


def test_environment_mistakes_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "lineer=cpu")
    with pytest.raises(BackendUnavailableError, match="lineer"):
        report()


def test_the_level_can_be_set(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    level = cpu.partition(":")[2]
    monkeypatch.setenv(isa.ENVIRONMENT, level)
    assert isa.load_level(None)[0] == level
    monkeypatch.setenv(isa.ENVIRONMENT, "avx1024")
    with pytest.raises(BackendUnavailableError, match="avx1024"):
        isa.load_level(None)


def test_the_best_supported_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.ENVIRONMENT, raising=False)
    try:
        supported = isa.supported_levels()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert supported[-1] == "baseline"
    assert isa.load_level(None)[0] == supported[0]


def _stubbed(body: list[ast.stmt], inside: str = "") -> dict[str, int]:
    """The functions of a stub and how many arguments each takes; methods as Class.name, self counted."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found[inside + node.name] = len(node.args.posonlyargs)
        elif isinstance(node, ast.ClassDef):
            found |= _stubbed(node.body, f"{node.name}.")
    return found


def _compiled(owner: object, inside: str = "") -> dict[str, int]:
    """The same of a compiled module, from the signatures that pybind11 writes."""
    found = {}
    for name, value in vars(owner).items():
        if isinstance(value, type):
            found |= _compiled(value, f"{name}.")
        elif callable(value) and (not name.startswith("_") or name == "__init__"):
            found[inside + name] = len(re.findall(r"(?:arg\d+|self): ", str(value.__doc__)))
    return found


@pytest.mark.parametrize("name", ["_cpuid", "_cpu_baseline", "_cpu_avx2", "_cpu_avx512"])
def test_stubs_show_what_is_compiled(name: str) -> None:
    try:
        usable = ["_cpuid", *(f"_cpu_{level}" for level in isa.supported_levels())]
        module = importlib.import_module(f"musicgen_kernels.{name}") if name in usable else None
    except (ImportError, BackendUnavailableError) as error:
        pytest.skip(f"not built: {error}")
    if module is None:
        pytest.skip(f"this processor cannot run {name}")
    stub = name if name == "_cpuid" else "_cpu_baseline"  # the others take their names from it
    text = (FOLDER / f"{stub}.pyi").read_text()
    assert _stubbed(ast.parse(text).body) == _compiled(module)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None or not EXTENSIONS:
        pytest.skip(f"needs {name} and the compiled kernels")
    return path


def test_extensions_export_only_their_entry_point() -> None:
    nm = _tool("nm")
    for path in EXTENSIONS:
        listing = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\S+$", listing, re.MULTILINE) == [f"PyInit_{path.name.partition('.')[0]}"]


@pytest.mark.parametrize(("level", "forbidden"), [("baseline", r"%[yz]mm"), ("avx2", r"%zmm|%k[0-7]\b")])
def test_a_level_holds_no_instruction_of_a_higher_one(level: str, forbidden: str) -> None:
    objdump = _tool("objdump")
    (path,) = FOLDER.glob(f"_cpu_{level}*.so")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    assert re.search(forbidden, listing) is None
