# SPDX-License-Identifier: Apache-2.0
"""Where a DALI pipeline is in its endless training data, and how to continue from there.

DALI can save the state of a pipeline after a batch (Pipeline.checkpoint()). In version 1.34, the
state of a pipeline that was itself restored is wrong until its reader has finished the epoch in
which it was restored (NVIDIA/DALI, pull request 5378). Until then the position is therefore the
state that was restored, and a number of batches to skip after it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Optional

import numpy as np

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data import dali_graph
from mxresnet.data.shard import RecordShard

_STATE, _BATCHES, _RESTARTS = "pipeline", "batches_since", "restarts"
# Distance of the seeds of pipelines that start anew after a resume.
_SEED_STEP = 7919


class PipelinePosition:
    """The position of one rank's training pipeline.

    Attributes:
        batches_since: batches delivered since the restored state, or since the start.
        is_exact: whether the position can be restored. If not, a resumed run starts a new pass over
            the data with another seed.
    """

    def __init__(self, shard: RecordShard, state: Optional[InputState]):
        """Take the shard, and the result of an earlier pipeline's state() or None."""
        values = state.values if state else {}
        self._shard = shard
        self._restored: Optional[bytes] = None
        if state and _STATE in state.arrays:
            self._restored = state.arrays[_STATE].tobytes()
        self.batches_since = self._to_skip = int(values.get(_BATCHES, 0))
        self._restarts = int(values.get(_RESTARTS, 0))
        self.is_exact = True
        self._is_supported = dali_graph.can_save_state()
        self._passed_images = 0  # images after which the reader has surely ended its epoch

    def build(self, config: Config, device_id: Optional[int], saves_state: bool) -> Any:
        """Return the built pipeline, which continues at this position."""
        saves_state = saves_state and self._shard.training
        shard = dataclasses.replace(
            self._shard, seed=(self._shard.seed + _SEED_STEP * self._restarts) % 2**31
        )
        if saves_state and self._is_supported:
            return dali_graph.build_pipeline(config, shard, device_id, True, self._restored)
        self.is_exact = not saves_state
        return dali_graph.build_pipeline(config, shard, device_id)

    def give_up(self, error: str) -> bool:
        """Return whether to build the pipeline again, without the ability to save its state.

        DALI reports an operator whose state it cannot save only when the operator runs.

        Args:
            error: message of the error in a batch.
        """
        first = self._restored is None and self.batches_since == 0
        if not (first and self._is_supported and "checkpoint" in error.lower()):
            return False
        self._is_supported = False
        return True

    def take_skipped_batches(self) -> int:
        """Return how many batches to read and drop before the next one; 0 from then on."""
        skipped, self._to_skip = self._to_skip, 0
        return skipped

    def state(self, pipeline: Any) -> InputState:
        """Return the position after the last batch.

        Args:
            pipeline: the pipeline that build() returned.
        """
        if not self.is_exact:
            return InputState({_RESTARTS: self._restarts + 1})
        if self._restored is not None and not self._has_ended_epoch(pipeline):
            state, batches = self._restored, self.batches_since
        elif self.batches_since == 0:
            return InputState()
        else:
            state, batches = pipeline.checkpoint(), 0
        return InputState({_BATCHES: batches}, {_STATE: np.frombuffer(state, dtype=np.uint8)})

    def _has_ended_epoch(self, pipeline: Any) -> bool:
        """Return whether the reader has read a whole shard since it was restored."""
        if not self._passed_images:
            size = pipeline.reader_meta(dali_graph.READER_NAME)["epoch_size"]
            self._passed_images = max(dali_graph.shard_sizes(size, self._shard.num_ranks))
        images = (self.batches_since - 1) * self._shard.batch_size
        return images >= self._passed_images
