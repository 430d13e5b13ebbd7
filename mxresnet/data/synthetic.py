# SPDX-License-Identifier: Apache-2.0
"""Synthetic data (--synth-data): one batch of random images, to measure training without input."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import mxnet as mx

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data.dataset import IMAGENET_CLASSES, IMAGENET_TRAIN_EXAMPLES, IMAGENET_VAL_EXAMPLES
from mxresnet.data.shard import RecordShard


class SyntheticIterator:
    """The same random batch every time, and an empty validation set.

    Pixels are uniform in [-1, 1) and labels uniform over the classes; both are on the rank's
    device.
    """

    wait_seconds = 0.0
    restores_exactly = True

    def __init__(
        self,
        config: Config,
        shard: RecordShard,
        device: mx.Context,
        saves_state: bool = False,
        state: Optional[InputState] = None,
    ):
        self._num_examples = (
            config.num_examples or IMAGENET_TRAIN_EXAMPLES
            if shard.training
            else config.num_val_examples or IMAGENET_VAL_EXAMPLES
        )
        shape = (shard.batch_size, *config.batch_shape[1:])
        classes = config.num_classes or IMAGENET_CLASSES
        images = mx.nd.random.uniform(-1, 1, shape, ctx=device)
        self._images = images.astype(config.input_dtype)
        self._labels = mx.nd.floor(
            mx.nd.random.uniform(0, classes, (shard.batch_size,), ctx=device)
        )

    def num_examples(self) -> int:
        """Return the number of images of the data set that is imitated."""
        return self._num_examples

    def next_train_batch(self) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return the images (batch, ...) of config.input_dtype and the float32 labels (batch,)."""
        return self._images, self._labels

    def state(self) -> InputState:
        """Return an empty state: every batch is the same."""
        return InputState()

    def iterate_validation(self) -> Iterator[Tuple[mx.nd.NDArray, mx.nd.NDArray, int]]:
        """Return an empty iterator."""
        return iter(())
