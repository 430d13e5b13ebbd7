# SPDX-License-Identifier: Apache-2.0
"""MXNet's own ImageRecordIter, where DALI is not installed or not wanted.

Unlike DALI it interpolates without antialiasing, so accuracies may differ a little from the published ones.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Tuple

import mxnet as mx

from mxresnet.config import Config
from mxresnet.data.dataset import DAMAGED
from mxresnet.errors import UserError

# ImageNet's mean and deviation in pixel values, as in NVIDIA's v2.1 benchmark.
_CHANNELS = {
    "mean_r": 123.675,
    "mean_g": 116.28,
    "mean_b": 103.53,
    "std_r": 58.395,
    "std_g": 57.12,
    "std_b": 57.375,
}


class ImageRecordIterator:
    """One iterator, made when it is first needed: it reads its file at once."""

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
        self._config, self._device, self._training = config, device, training
        part = "data_train" if training else "data_val"
        self._records, self._index = paths[part], paths[f"{part}_idx"]
        self._where = (
            f"rank {rank}, {'training' if training else 'validation'} data {config.path(part)}"
        )
        self._batch_size = config.batch_size * (config.input_batch_multiplier if training else 1)
        self._rank, self._ranks = rank, ranks
        self._seed = seed
        self._made: Any = None

    def examples(self) -> int:
        """Images in the whole file, counted in its index."""
        with open(self._index, "rb") as file:
            return sum(1 for _ in file)

    @property
    def _iterator(self) -> Any:
        if self._made is None:
            config = self._config
            _, height, width = config.image_shape
            options: Dict[str, Any] = {"resize": config.resize}
            if self._training:
                options = {
                    "random_resized_crop": True,
                    "min_random_area": config.min_random_area,
                    "max_random_area": config.max_random_area,
                    "min_aspect_ratio": config.min_random_aspect_ratio,
                    "max_aspect_ratio": config.max_random_aspect_ratio,
                    "rand_mirror": config.rand_mirror,
                    "shuffle": True,
                    "seed": self._seed,
                    "seed_aug": self._seed,
                }
            try:
                self._made = mx.io.ImageRecordIter(
                    path_imgrec=self._records,
                    path_imgidx=self._index,
                    data_shape=(3, height, width),
                    batch_size=self._batch_size,
                    preprocess_threads=config.dali_threads,
                    prefetch_buffer=config.dali_prefetch_queue,
                    round_batch=self._training,  # true: what fills the last batch is left out of the next epoch
                    verbose=False,
                    part_index=self._rank,
                    num_parts=self._ranks,
                    **_CHANNELS,
                    **options,
                )
            except mx.MXNetError as error:
                raise self._explained(error) from None
        return self._made

    def _explained(self, error: Exception) -> UserError:
        reason = next(
            (
                line.split("Check failed: ")[-1]
                for line in str(error).splitlines()
                if "rror" in line or "failed" in line
            ),
            str(error),
        )
        return UserError(f"{self._where} cannot be used: {reason.strip()} {DAMAGED}")

    def _converted(self, batch: Any) -> Tuple[Any, Any]:
        """From float32 NCHW with 3 channels to the network's input."""
        config = self._config
        image = batch.data[0].as_in_context(self._device)
        if config.image_shape[0] == 4:
            image = mx.nd.concat(
                image, mx.nd.zeros((image.shape[0], 1, *image.shape[2:]), ctx=self._device), dim=1
            )
        if config.input_layout == "NHWC":
            image = image.transpose((0, 2, 3, 1))
        return image.astype(config.input_dtype, copy=False), batch.label[0]

    def next(self) -> Tuple[Any, Any]:
        try:
            try:
                return self._converted(self._iterator.next())
            except StopIteration:
                self._iterator.reset()
                return self._converted(self._iterator.next())
        except mx.MXNetError as error:
            raise self._explained(error) from None

    def evaluation(self) -> Iterator[Tuple[Any, Any, int]]:
        # The iterator gives each part ceil(images / parts) but the last ones; its own count of padding is not to be had
        # without round_batch, which would leave images out of the next evaluation.
        examples = self.examples()
        share = -(-examples // self._ranks)
        left = max(0, min(examples - self._rank * share, share))
        if left:  # a part without images has no iterator
            self._iterator.reset()
        for _ in range(-(-left // self._batch_size)):
            num_valid = min(self._batch_size, left)
            left -= num_valid
            yield (*self.next(), num_valid)
