"""Node failure during streaming, on a multi-node cluster on one machine.

A head node and two engine nodes, each with room for one language model. One engine node is killed with all its
processes while streams are running; every stream must end with the same audio as without the failure. Prints one line
of JSON.

    python -m benchmarks.multi_node --streams 6
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from musicgen_serving import cluster
from musicgen_serving.client import connect
from ray.cluster_utils import Cluster

from benchmarks import chaos_cluster

ENGINE = "engine_pool"
"""Custom resource of the engine nodes."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill one node of a cluster while streaming.")
    parser.add_argument("--streams", type=int, default=6, metavar="N")
    parser.add_argument("--duration", type=float, default=30.0, metavar="SECONDS", help="duration of each piece")
    options = parser.parse_args()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    engines = [nodes.add_node(num_cpus=0, resources={ENGINE: 1}) for _ in range(2)]
    how = chaos_cluster.settings(
        {"LanguageModel": 2},
        model={"language_model": {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0, "resources": {ENGINE: 1}}},
        ray_address=nodes.address,
    )
    try:
        endpoints = cluster.start(how)
        result = _lose_a_node(nodes, engines[0], endpoints, options)
    finally:
        cluster.stop()
        nodes.shutdown()
    print(json.dumps(result))
    return 0 if result["equal"] == result["streams"] else 1


def _lose_a_node(
    nodes: Cluster, node: Any, endpoints: cluster.Endpoints, options: argparse.Namespace
) -> dict[str, Any]:
    alive = sum(bool(info["Alive"]) for info in ray.nodes())
    replicas = chaos_cluster.replica_pids("LanguageModel")
    urls = [endpoints.http if index % 2 else str(endpoints.grpc) for index in range(options.streams)]
    undisturbed = [_checksum(url, index, options.duration, None) for index, url in enumerate(urls)]
    started = [threading.Event() for _ in urls]
    with ThreadPoolExecutor(len(urls)) as pool:
        futures = [
            pool.submit(_checksum, url, index, options.duration, event)
            for index, (url, event) in enumerate(zip(urls, started, strict=True))
        ]
        for event in started:
            event.wait(60)
        began = time.monotonic()
        nodes.remove_node(node, allow_graceful=False)
        got = [future.result() for future in futures]
    lost = [pid for pid in replicas if not os.path.exists(f"/proc/{pid}")]
    return {
        "nodes": alive,
        "language_models_lost": len(lost),
        "streams": len(urls),
        "equal": sum(one == other for one, other in zip(got, undisturbed, strict=True)),
        "seconds_after_the_loss": round(time.monotonic() - began, 2),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _checksum(url: str, index: int, duration_s: float, started: threading.Event | None) -> str:
    """SHA-256 of one stream's samples."""
    digest = hashlib.sha256()
    with connect(url) as client, client.stream("happy rock", duration_s=duration_s, seed=index) as stream:
        for chunk in stream:
            digest.update(chunk.samples.T.tobytes())
            if started is not None:
                started.set()
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
