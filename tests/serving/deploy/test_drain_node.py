"""The pods' preStop hook: whom it waits for, and when it stops waiting."""

from __future__ import annotations

import subprocess
import sys

import deploy_files
import pytest

drain_node = deploy_files.module("drain_node.py")
NODE = "ab" * 28
RAYLET = ["/opt/raylet", "--raylet_socket_name=/tmp/x", f"--node_id={NODE}", "--head=false"]
REPLICA = ["ray::ServeReplica:musicgen:HttpIngress.handle_request"]
OTHER = ["ray::IDLE"]


@pytest.mark.parametrize("flag", ["--node_id", "--node-id"])
def test_the_nodes_id_is_the_raylets(flag: str) -> None:
    assert drain_node.node_id([[], OTHER, ["raylet", f"{flag}={NODE}"]]) == NODE


def test_without_a_raylet_there_is_no_id() -> None:
    assert drain_node.node_id([[], OTHER, ["grep", f"x--node_id={NODE}"]]) is None


def test_ray_names_the_flag_as_is_believed_here() -> None:
    from ray._private import services

    with open(services.__file__) as source:
        assert '"--node_id"' in source.read()


def test_replicas_and_proxies_count_and_nothing_else() -> None:
    assert drain_node.num_serving([[], RAYLET, OTHER, REPLICA, REPLICA]) == 2


def waited(lines: list[list[list[str]]], answers: list[bool], timeout_s: float = 100.0) -> tuple[str, int]:
    """Why the wait ended, and after how many naps. The last of each list stays."""
    naps: list[float] = []

    def at(values: list, now: int):  # type: ignore[no-untyped-def, type-arg]
        return values[min(now, len(values) - 1)]

    why = drain_node.wait_until_idle(
        "head:6379",
        timeout_s,
        lines=lambda: at(lines, len(naps)),
        answers=lambda _: at(answers, len(naps)),
        sleep=naps.append,
    )
    return why, len(naps)


def test_waits_for_the_last_replica() -> None:
    assert waited([[REPLICA, REPLICA], [REPLICA], [REPLICA, OTHER], [OTHER]], [True]) == ("idle", 3)


def test_gives_up_when_the_head_is_gone_but_not_at_once() -> None:
    assert waited([[REPLICA]], [True, False, False, True, False]) == ("the head is gone", 6)


def test_gives_up_when_the_time_is_over() -> None:
    assert waited([[REPLICA]], [True], timeout_s=20.0) == ("out of time", 10)


def test_does_nothing_where_no_ray_runs() -> None:
    command = [sys.executable, str(deploy_files.DEPLOY / "drain_node.py"), "--timeout-s", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={}, check=False)
    assert done.returncode == 0
    assert "nothing to drain" in done.stdout


def test_asks_ray_for_a_drain_that_it_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.core.generated import autoscaler_pb2
    from ray.scripts.scripts import drain_node as command

    asked: list[list[str]] = []

    def run(arguments: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 0)

    monkeypatch.setattr(drain_node.subprocess, "run", run)
    assert drain_node.drain("head:6379", NODE, 30)
    name, sub, *options = asked[0]
    assert (name, sub) == ("ray", "drain-node")
    assert set(options[::2]) <= {option for parameter in command.params for option in parameter.opts}
    assert autoscaler_pb2.DrainNodeReason.Value(options[options.index("--reason") + 1])
    assert options[options.index("--node-id") + 1] == NODE
