"""docs/operations.md: its tables are the code's, and the files that it names exist."""

from __future__ import annotations

import re

import deploy_files
from deploy_files import ROOT
from musicgen_serving.metrics import METRICS
from musicgen_serving.settings import ReplicaSettings, TenantSettings

GUIDE = (ROOT / "docs/operations.md").read_text()


def section(begin: str) -> str:
    return GUIDE.partition(f"<!-- {begin}: begin -->")[2].partition(f"<!-- {begin}: end -->")[0]


def test_the_tables_name_every_setting_and_metric() -> None:
    for name in (
        *ReplicaSettings.model_fields,
        *TenantSettings.model_fields,
        "limits.max_duration_s",
        "grpc.client_ca",
    ):
        assert f"| `{name}` |" in section("settings"), name
    for name in METRICS:
        assert f"_{name}" in section("metrics"), name


def test_the_settings_table_says_what_the_code_says() -> None:
    lines = section("settings").splitlines()
    assert "| `http.port` | integer ≥ 1, ≤ 65535 | `8000` |  |" in lines
    assert "| `access.open` | true, false | `false` | " in section("settings")
    assert "| `name` | text | required |  |" in lines


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"`(deploy/[\w./-]+)`", GUIDE):
        assert (ROOT / path).exists(), path
    for row in re.findall(r"^\| (`(?:kuberay|monitoring|settings)[^|]*)\|", GUIDE, re.MULTILINE):
        folder = re.findall(r"`([\w-]+)/", row)[0]
        for name in re.findall(r"`(?:[\w-]+/)?([\w.*-]*)`", row):
            assert list((deploy_files.DEPLOY / folder).glob(name or "*")), row


def test_the_proxys_time_is_the_longest_request() -> None:
    drain_s = deploy_files.settings_of("rayservice").drain_s
    assert re.findall(r"proxy_read_timeout (\d+)s;", GUIDE) == [f"{drain_s:.0f}"]
