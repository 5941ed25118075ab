"""Dashboard, alert rules and scraping: they parse, and name only what the service really offers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import deploy_files
import pytest
from musicgen_serving.errors import _TABLE, CLIENT_CODES, NotOfferedError, TooLargeError
from musicgen_serving.metrics import METRICS, PREFIX, RAY_PREFIX

from musicgen.errors import InvalidRequestError, OverloadedError, QuotaExceededError

FULL = RAY_PREFIX + PREFIX
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
NAMES = {f"{FULL}{name}{suffix}": name for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]}
ADDED_LABELS = {"le"}
SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}")
BY = re.compile(r"\b(?:by|without) \(([^)]*)\)")


def dashboard() -> dict[str, Any]:
    loaded = json.loads(deploy_files.read("monitoring/dashboard.json"))
    assert isinstance(loaded, dict)
    return loaded


def rules() -> list[dict[str, Any]]:
    (document,) = deploy_files.documents("monitoring/rules.yaml")
    return [rule for group in document["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """Everything that is asked of Prometheus, with Grafana's variables filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace('"$model"', '".*"').replace("$", "")
    for rule in rules():
        yield rule["expr"]


def used_names(expression: str) -> set[str]:
    return set(re.findall(rf"\b{FULL}\w+", expression))


def test_expressions_are_promql() -> None:
    promql = pytest.importorskip("promql_parser")
    found = list(expressions())
    assert len(found) > 20
    for expression in found:
        promql.parse(expression)
    with pytest.raises(ValueError, match="parenthes"):
        promql.parse("sum by (x) (rate(y[5m])")


def test_every_metric_that_is_asked_for_exists() -> None:
    for expression in expressions():
        assert used_names(expression), expression
        assert used_names(expression) <= set(NAMES), expression
        assert not re.findall(rf"(?<!{RAY_PREFIX})\b{PREFIX}\w+", expression), expression


def test_every_metric_is_shown() -> None:
    shown = {NAMES[name] for expression in expressions() for name in used_names(expression)}
    assert shown == set(METRICS)


def test_only_labels_that_the_metric_has_are_used() -> None:
    for expression in expressions():
        labels = set(ADDED_LABELS)
        for name in used_names(expression):
            labels |= set(METRICS[NAMES[name]].labels)
        for name, selector in SELECTOR.findall(expression):
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert asked <= set(METRICS[NAMES[name]].labels), expression
        for grouped in BY.findall(expression):
            assert {label.strip() for label in grouped.split(",")} <= labels, expression


def test_counters_are_only_used_as_rates_and_gauges_never() -> None:
    for expression in expressions():
        for name in used_names(expression):
            is_gauge = METRICS[NAMES[name]].kind == "gauge"
            in_rate = re.search(rf"(?:rate|increase)\({name}\b", expression) is not None
            assert in_rate != is_gauge, expression


def test_reasons_are_the_codes_that_the_service_uses() -> None:
    codes = {row.error: row.code for row in _TABLE}
    named = {reason for rule in rules() for reason in re.findall(r'reason="(\w+)"', rule["expr"])}
    assert named == {codes[OverloadedError], codes[QuotaExceededError]}
    # What `Pipeline.prepare` can find to be its caller's mistake, after admission: no failure of the service.
    mistakes = {codes[error] for error in (InvalidRequestError, NotOfferedError, TooLargeError)}
    assert mistakes <= CLIENT_CODES
    of_failures = [expression for expression in expressions() if "requests_failed" in expression]
    assert len(of_failures) == 3
    for expression in of_failures:
        (listed,) = re.findall(r'reason[!=]~"([\w|]+)"', expression)
        assert set(listed.split("|")) == mistakes, expression


def test_rules_are_complete_and_named_once() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 8
    for rule in rules():
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert {"summary", "description"} <= set(rule["annotations"])
        for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            assert label in "".join(BY.findall(rule["expr"])), rule["alert"]


def test_kubernetes_gets_the_same_rules() -> None:
    (alerts,) = deploy_files.documents("monitoring/alerts.yaml")
    (plain,) = deploy_files.documents("monitoring/rules.yaml")
    assert alerts["kind"] == "PrometheusRule"
    assert alerts["spec"] == plain


def test_the_pod_monitor_finds_every_pod() -> None:
    (monitor,) = deploy_files.documents("monitoring/podmonitor.yaml")
    for pool in deploy_files.pools("rayservice").values():
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pool.labels.items()
        ports = {port["name"] for port in pool.ray["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboards_variables_exist() -> None:
    text = json.dumps(dashboard()["panels"])
    declared = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval"}
    assert used <= declared


def test_on_one_machine_the_names_become_those_of_a_cluster() -> None:
    (prometheus,) = deploy_files.documents("monitoring/prometheus.yaml")
    (job,) = prometheus["scrape_configs"]
    (relabel,) = job["metric_relabel_configs"]
    for name in NAMES:
        offered = name.removeprefix(RAY_PREFIX)
        match = re.fullmatch(relabel["regex"], offered)
        assert match is not None
        assert relabel["replacement"].replace("$1", match[1]) == name
    assert re.fullmatch(relabel["regex"], "process_cpu_seconds_total") is None


SHOW = """
import sys
from prometheus_client import REGISTRY, generate_latest
from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder

recorder = OpenTelemetryMetricRecorder()
for line in sys.stdin.read().split():
    kind, name = line.split(":")
    if kind == "histogram":
        recorder.register_histogram_metric(name, "d", [1.0, 2.0])
    else:
        getattr(recorder, f"register_{kind}_metric")(name, "d")
    recorder.set_metric_value(name, {}, 1.0)
print(generate_latest(REGISTRY).decode())
"""


def test_ray_offers_the_metrics_under_these_names() -> None:
    asked = "\n".join(f"{metric.kind}:{PREFIX}{name}" for name, metric in METRICS.items())
    done = subprocess.run(
        [sys.executable, "-c", SHOW], input=asked, capture_output=True, text=True, timeout=60, check=True
    )
    offered = {re.split(r"[{ ]", line)[0] for line in done.stdout.splitlines() if line.startswith(FULL)}
    assert offered - {name for name in offered if name.endswith("_created")} == set(NAMES)
