"""Writes what is generated in deploy/ and docs/: serve.yaml, serveConfigV2 and alerts of Kubernetes, the
tables of settings and metrics.

    python deploy/render.py            write what is out of date
    python deploy/render.py --check    only say what is out of date; exits with 1 if something is

One source each: deploy/settings/*.yaml, deploy/monitoring/rules.yaml, and the models in `musicgen_serving.settings`.
The environment's own MUSICGEN_ variables take no part.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from musicgen_serving.metrics import METRICS, PREFIX, RAY_PREFIX
from musicgen_serving.serve_config import to_serve_config, to_yaml
from musicgen_serving.settings import ENV_PREFIX, ReplicaSettings, ServeSettings, TenantSettings, load_settings
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parent.parent
NOTE = "# Written by `python deploy/render.py` from deploy/settings/{name}.yaml. Change that one.\n"
MANIFESTS = {"deploy/kuberay/rayservice.yaml": "cluster", "deploy/kuberay/rayservice-cpu.yaml": "cpu"}
BLOCK = re.compile(r"^  serveConfigV2: \|\n(?:    .*\n|\n)*", re.MULTILINE)


def serve_config(name: str) -> str:
    """The text for `serve deploy` of one file of deploy/settings."""
    return to_yaml(to_serve_config(load_settings(ROOT / f"deploy/settings/{name}.yaml")))


def with_serve_config(manifest: str, config: str) -> str:
    """A manifest with its `serveConfigV2` replaced. Raises: ValueError: it has not exactly one."""
    block = "  serveConfigV2: |\n" + "".join(f"    {line}\n" for line in config.splitlines())
    text, num_found = BLOCK.subn(lambda _: block, manifest)
    if num_found != 1:
        raise ValueError(f"expected one serveConfigV2 in the manifest, got {num_found}")
    return text


def alerts() -> str:
    """The alert rules as Prometheus' operator takes them."""
    rules = yaml.safe_load((ROOT / "deploy/monitoring/rules.yaml").read_text())
    head = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule"}
    metadata = {"name": "musicgen", "labels": {"app.kubernetes.io/name": "musicgen"}}
    note = "# Written by `python deploy/render.py` from deploy/monitoring/rules.yaml. Change that one.\n"
    return note + to_yaml({**head, "metadata": metadata, "spec": rules})


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A document with what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->` replaced."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def metrics_table() -> str:
    """Markdown table of every metric, under the names that a cluster shows."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for name, metric in METRICS.items():
        shown = f"{RAY_PREFIX}{PREFIX}{name}{'_total' if metric.kind == 'counter' else ''}"
        rows.append(f"| `{shown}` | {metric.kind} | {', '.join(metric.labels)} | {metric.description} |")
    return "\n".join(rows)


def settings_table() -> str:
    """Markdown tables of every setting: the tree, and the two sections that occur in several places."""
    return "\n".join(
        (
            *_table(ServeSettings),
            "",
            "A deployment's replicas (`REPLICAS` above):",
            "",
            *_table(ReplicaSettings),
            "",
            "A tenant (`TENANT` above, and each entry of the tenants file):",
            "",
            *_table(TenantSettings),
        )
    )


def _table(model: type[BaseModel]) -> list[str]:
    rows = [f"| {' | '.join(row)} |" for row in _rows(model, "")]
    return ["| setting | type | default | meaning |", "|---|---|---|---|", *rows]


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each setting below a section, in the order of the file."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        full = f"{prefix}{name}" if get_args(field.annotation) == () or section is None else f"{prefix}{name}[]"
        if section is None:
            default = _default(field.get_default(call_default_factory=True))
            yield f"`{full}`", _type(field.annotation) + _bounds(field), default, field.description or ""
        elif issubclass(section, ReplicaSettings):
            load = section.model_fields["target_load"].default
            unit = (section.__doc__ or "").partition("Load: ")[2]
            note = f"`target_load` {load:g}: {unit}" if unit else "replicas of this ingress"
            yield f"`{full}`", "REPLICAS", "see below", note
        elif issubclass(section, TenantSettings):
            yield f"`{full}`", "TENANT", "see below", ""
        else:
            yield from _rows(section, f"{full}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field is, or is a list of."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is Annotated:
        return _type(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not NoneType)
    if origin is not None:
        return f"{origin.__name__} of {' to '.join(_type(arg) for arg in args)}"
    return {str: "text", int: "integer", float: "number", bool: "true, false", Path: "path"}[annotation]


def _bounds(field: FieldInfo) -> str:
    inside = [part for arg in get_args(field.annotation) for part in getattr(arg, "__metadata__", ())]
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found: list[str] = []
    for part in [*field.metadata, *(inner for outer in inside for inner in getattr(outer, "metadata", (outer,)))]:
        found += [f"{sign} {getattr(part, name):g}" for name, sign in signs.items() if hasattr(part, name)]
    return f" {', '.join(found)}" if found else ""


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ([], {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def rendered() -> Iterator[tuple[Path, str]]:
    """Each generated file and what it should say."""
    yield ROOT / "deploy/serve.yaml", NOTE.format(name="cluster") + serve_config("cluster")
    for path, name in MANIFESTS.items():
        yield ROOT / path, with_serve_config((ROOT / path).read_text(), serve_config(name))
    yield ROOT / "deploy/monitoring/alerts.yaml", alerts()
    guide = ROOT / "docs/operations.md"
    tables = {"settings": settings_table(), "metrics": metrics_table()}
    yield guide, with_tables(guide.read_text(), tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        del os.environ[name]
    stale = [(path, text) for path, text in rendered() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
