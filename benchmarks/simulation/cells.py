"""A cluster partitioned into cells, each with its own balancer and simulated in its own process.

Requests are split randomly between the cells in proportion to their replicas. A thinned Poisson process is Poisson, and
bursts hit all cells at the same time, so each cell sees the same load as the whole cluster, only balanced among fewer
replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from benchmarks.simulation.cluster import Balancing, Run, run
from benchmarks.simulation.replica import ReplicaConfig
from benchmarks.simulation.workload import Request


def run_cells(
    requests: Sequence[Request],
    num_replicas: int,
    config: ReplicaConfig,
    *,
    num_cells: int,
    balancing: Balancing = "two",
    seed: int = 0,
) -> Run:
    """As `cluster.run`, in `num_cells` cells of (nearly) equal size."""
    sizes = [len(part) for part in np.array_split(np.arange(num_replicas), min(num_cells, num_replicas))]
    shares = np.array(sizes) / num_replicas
    cell_of = np.random.default_rng((seed, 3)).choice(len(sizes), len(requests), p=shares)
    parts = [[r for r, c in zip(requests, cell_of, strict=True) if c == cell] for cell in range(len(sizes))]
    one = partial(run, config=config, balancing=balancing)
    with ProcessPoolExecutor(len(sizes)) as pool:
        futures = [
            pool.submit(one, part, size, seed=seed + cell)
            for cell, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]
        runs = [future.result() for future in futures]
    return _merged(runs, config)


def _merged(runs: list[Run], config: ReplicaConfig) -> Run:
    return Run(
        config,
        outcomes=sorted((o for part in runs for o in part.outcomes), key=lambda o: o.request.number),
        looks=sorted((look for part in runs for look in part.looks), key=lambda look: look.at_s),
        uses=[use for part in runs for use in part.uses],
        fairness=[gap for part in runs for gap in part.fairness],
    )
