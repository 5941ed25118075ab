"""The engine's runner, with a count of its steps and points at which a test can hold it."""

from __future__ import annotations

import numpy as np

from musicgen.engine.batch import ScheduledBatch
from musicgen.engine.runner import ModelRunner
from musicgen.engine.sequence import Phase
from musicgen_serving import delay_points


class CountingRunner(ModelRunner):
    """Counts the steps it has run. Used by the engine's thread; the count may be read by others."""

    num_steps = 0

    def run(self, batch: ScheduledBatch) -> np.ndarray:
        delay_points.hold(delay_points.LM_STEP)
        if any(chunk.sequence.phase is Phase.PREFILL for chunk in batch.chunks):
            delay_points.hold(delay_points.LM_PREFILL)
        self.num_steps += 1
        return super().run(batch)
