"""The engine's runner, with a step counter and failpoints for tests."""

from __future__ import annotations

import numpy as np

from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.runner import ModelRunner
from musicgen.engine.sequence import Phase
from musicgen_serving import delay_points


class CountingRunner(ModelRunner):
    """Counts its steps. Runs on the engine's thread; the counter may be read from others."""

    num_steps = 0

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        delay_points.hold(delay_points.LM_STEP)
        if any(chunk.sequence.phase is Phase.PREFILL for chunk in batch.chunks):
            delay_points.hold(delay_points.LM_PREFILL)
        self.num_steps += 1
        return super().run(batch)
