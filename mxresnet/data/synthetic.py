# SPDX-License-Identifier: Apache-2.0
"""Random images and labels, the same batch every time: what a machine does without its storage and decoders."""

from __future__ import annotations

from typing import Any, Dict, Iterator, Tuple

import mxnet as mx

from mxresnet.config import Config
from mxresnet.data.dataset import IMAGENET


class SyntheticIterator:
    """Pixels uniform in [-1, 1), on the rank's own device; there is nothing to evaluate."""

    def __init__(
        self,
        config: Config,
        paths: Dict[str, str],
        rank: int,
        ranks: int,
        device: Any,
        seed: int,
        training: bool,
    ):
        count = config.batch_size * (config.input_batch_multiplier if training else 1)
        classes = config.num_classes or IMAGENET["classes"]
        self._examples = (
            (config.num_examples or IMAGENET["train"])
            if training
            else (config.num_val_examples or IMAGENET["val"])
        )
        self._image = mx.nd.random.uniform(
            -1, 1, (count, *config.batch_shape[1:]), ctx=device
        ).astype(config.input_dtype)
        self._label = mx.nd.floor(mx.nd.random.uniform(0, classes, (count,), ctx=device))

    def examples(self) -> int:
        return self._examples

    def next(self) -> Tuple[Any, Any]:
        return self._image, self._label

    def evaluation(self) -> Iterator[Tuple[Any, Any, int]]:
        return iter(())
