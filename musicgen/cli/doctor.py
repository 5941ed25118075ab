"""`musicgen doctor`: versions, devices and selected backends, with the reasons. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
from dataclasses import asdict
from typing import Any

import torch
from musicgen_kernels import backend, isa
from musicgen_kernels.errors import BackendUnavailableError

from musicgen import __version__
from musicgen.cli.quiet import quiet_libraries

PACKAGES = (
    *("torch", "torchaudio", "transformers", "huggingface-hub", "soundfile", "pyloudnorm"),
    *("triton", "ray", "demucs"),
)
NOT_INSTALLED = "not installed"


def run(*, json: bool) -> int:
    """Print the findings. Returns the exit code."""
    with quiet_libraries():
        found = examine()
    print(json_format.dumps(found) if json else _as_text(found))
    return 0


def examine() -> dict[str, Any]:
    """The findings as plain data; what could not be determined is replaced by the reason."""
    return {
        "musicgen": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "devices": _devices(),
        "cpu": _cpu(),
        "backends": {device: _backends(device, dtype) for device, dtype in _targets()},
        "steps": {device: _step(device) for device, _ in _targets()},
        "stems": _stems(),
        "hugging_face": _hugging_face(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _devices() -> list[str]:
    devices = [f"cpu: {_processor()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory_gib = properties.total_memory / 2**30
        devices.append(
            f"cuda:{index}: {properties.name}, {memory_gib:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return devices


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def _cpu() -> dict[str, Any]:
    """The compiled CPU kernels: the instruction-set level in use, or why there is none."""
    found: dict[str, Any] = {"torch_capability": torch.backends.cpu.get_cpu_capability()}
    found["torch_threads"] = torch.get_num_threads()
    try:
        found["supported_levels"] = isa.supported_levels()
        found["extension"] = isa.load_level(None)[0]
        found["reason"] = f"best level available; set {isa.ENVIRONMENT} to override"
        if os.environ.get(isa.ENVIRONMENT, "").strip():
            found["reason"] = f"selected by {isa.ENVIRONMENT}"
    except BackendUnavailableError as error:
        found["extension"], found["reason"] = None, str(error)
    return found


def _targets() -> list[tuple[str, torch.dtype]]:
    """The devices, each with the default dtype of models on it."""
    on_gpu = [("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    return [("cpu", torch.float32), *on_gpu]


def _backends(device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    try:
        return [asdict(choice) for choice in backend.report(device, dtype)]
    except BackendUnavailableError as error:
        return [{"operation": "all", "backend": "none", "reason": str(error)}]


def _step(device: str) -> dict[str, str]:
    """How the engine runs a step of a released model on `device`; mirrors `musicgen_kernels.whole_step`."""
    piecemeal = "operations"
    if device != "cpu":
        return {"runs": piecemeal, "reason": "one at a time, on the backends above"}
    try:
        asked = {backend.from_environment(name) for name in backend.OPERATIONS if name != "delayed_sample_step"}
        named = {name or "cpu" for name in asked}
        if len(named) > 1 or not all(name.partition(":")[0] == "cpu" for name in named):
            return {"runs": piecemeal, "reason": f"one at a time, because {backend.ENVIRONMENT} selects backends"}
        level, _ = isa.load_level(named.pop().partition(":")[2] or None)
    except BackendUnavailableError as error:
        if os.environ.get(backend.ENVIRONMENT):
            return {"runs": "none", "reason": str(error)}
        return {"runs": piecemeal, "reason": f"one at a time: {error}"}
    return {"runs": "one call", "reason": f"to the C++ kernels at level {level}, instead of the operations above"}


def _stems() -> str:
    if importlib.util.find_spec("demucs") is None:
        return "demucs is not installed: pip install 'musicgen-serve[stems]'"
    return "demucs is installed"


def _hugging_face() -> dict[str, Any]:
    from huggingface_hub import constants

    return {"cache": str(constants.HF_HUB_CACHE), "offline": bool(constants.HF_HUB_OFFLINE)}


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"musicgen {found['musicgen']}, Python {found['python']}", "", "versions"]
    lines += [f"  {name:16}{version}" for name, version in found["versions"].items()]
    lines += ["", "devices", *(f"  {device}" for device in found["devices"])]
    cpu = found["cpu"]
    lines += ["", "CPU", f"  torch           {cpu['torch_capability']}, {cpu['torch_threads']} threads"]
    if cpu["extension"] is None:
        lines.append(f"  C++ kernels     none: {cpu['reason']}")
    else:
        levels = ", ".join(cpu["supported_levels"])
        lines.append(f"  C++ kernels     {cpu['extension']} (supported: {levels}): {cpu['reason']}")
    for device, choices in found["backends"].items():
        lines += ["", f"kernel backends on {device}"]
        lines += [f"  {choice['operation']:22}{choice['backend']:12}{choice['reason']}" for choice in choices]
        step = found["steps"][device]
        lines.append(f"  {'engine step':22}{step['runs']:12}{step['reason']}")
    hub = found["hugging_face"]
    lines += ["", "weights", f"  cache           {hub['cache']}"]
    lines.append(f"  offline mode    {'on (no downloads)' if hub['offline'] else 'off'}")
    return "\n".join([*lines, "", "stems", f"  {found['stems']}"])
