# SPDX-License-Identifier: Apache-2.0
"""Batches from MXNet's own ImageRecordIter, for machines without DALI and for --use-dali 0.

Unlike DALI, ImageRecordIter resizes without antialiasing, so accuracies may differ a little from
the published ones.
"""

from __future__ import annotations

import time
from typing import Any, Dict, Iterator, Optional, Tuple

import mxnet as mx

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data.record_file import check_record_file, find_wrong_label, label_error
from mxresnet.data.shard import RecordShard

# ImageNet's mean and standard deviation in pixel values, as in NVIDIA's v2.1 benchmark.
_NORMALIZATION = {
    "mean_r": 123.675,
    "mean_g": 116.28,
    "mean_b": 103.53,
    "std_r": 58.395,
    "std_g": 57.12,
    "std_b": 57.375,
}


class ImageRecordIterator:
    """Batches of one mx.io.ImageRecordIter, created at its first use because that reads records."""

    restores_exactly = True

    def __init__(
        self,
        config: Config,
        shard: RecordShard,
        device: mx.Context,
        saves_state: bool = False,
        state: Optional[InputState] = None,
    ):
        """Prepare to read. To restore a state, the first batch decodes all images before it."""
        self._batches = 0  # training batches read so far
        self._skipped_batches = int(state.values["batches"]) if state else 0
        self._config, self._shard, self._device = config, shard, device
        self.wait_seconds = 0.0
        self._created_iterator: Optional[mx.io.DataIter] = None
        self._num_examples = 0

    def num_examples(self) -> int:
        """Check the record file and return the number of its images, those of all shards.

        Raises:
            UserError: the records cannot be read or are damaged.
        """
        self._num_examples = check_record_file(self._shard)
        # MXNet rounds the sizes of the shards up, so that the last ones may be empty.
        shards = self._shard.num_ranks
        if self._shard.training and -(-self._num_examples // shards) * (shards - 1) >= (
            self._num_examples
        ):
            raise self._shard.too_few_images(self._num_examples)
        return self._num_examples

    def next_train_batch(self) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return the next images (batch, ...) and float32 labels (batch,).

        Raises:
            UserError: the records cannot be read or decoded, or a label is not the number of a
                class.
        """
        while self._batches < self._skipped_batches:
            self._next_batch(self._shard.batch_size)
            self._batches += 1
        self._batches += 1
        return self._next_batch(self._shard.batch_size)

    def state(self) -> InputState:
        """Return how many training batches were read since the start of the run."""
        return InputState({"batches": max(self._batches, self._skipped_batches)})

    def iterate_validation(self) -> Iterator[Tuple[mx.nd.NDArray, mx.nd.NDArray, int]]:
        """Yield (images, labels, num_valid) for one pass over this rank's shard.

        The number of valid images is computed here. MXNet counts its padding only with
        round_batch, which would leave images out of the next evaluation.

        Raises:
            UserError: the records cannot be read or decoded, or a label is not the number of a
                class.
        """
        num_examples, shard = self._num_examples, self._shard
        # MXNet's shards have ceil(images / shards) images, except the last ones.
        largest_size = -(-num_examples // shard.num_ranks)
        remaining = max(0, min(num_examples - shard.rank * largest_size, largest_size))
        if remaining:  # MXNet cannot create an iterator without images
            self._reset()
        for _ in range(-(-remaining // shard.batch_size)):
            num_valid = min(shard.batch_size, remaining)
            remaining -= num_valid
            yield (*self._next_batch(num_valid), num_valid)

    @property
    def _iterator(self) -> mx.io.DataIter:
        if self._created_iterator is None:
            options = self._train_options() if self._shard.training else self._val_options()
            try:
                self._created_iterator = self._create_iterator(**options)
            except mx.MXNetError as error:
                raise self._shard.read_error(_reason(error)) from None
        return self._created_iterator

    def _create_iterator(self, **options: Any) -> mx.io.DataIter:
        """Return the iterator; it decodes, crops and normalizes to float32 (batch, 3, H, W)."""
        config, shard = self._config, self._shard
        _, height, width = config.image_shape
        return mx.io.ImageRecordIter(
            path_imgrec=shard.records_path,
            path_imgidx=shard.index_path,
            data_shape=(3, height, width),
            batch_size=shard.batch_size,
            preprocess_threads=config.dali_threads,
            prefetch_buffer=config.dali_prefetch_queue,
            # True: fill the last batch with images of the next epoch, which then leaves them out.
            round_batch=shard.training,
            verbose=False,
            part_index=shard.rank,
            num_parts=shard.num_ranks,
            **_NORMALIZATION,
            **options,
        )

    def _train_options(self) -> Dict[str, Any]:
        """Return the options for random crops, mirroring and shuffling."""
        config, seed = self._config, self._shard.seed
        return {
            "random_resized_crop": True,
            "min_random_area": config.min_random_area,
            "max_random_area": config.max_random_area,
            "min_aspect_ratio": config.min_random_aspect_ratio,
            "max_aspect_ratio": config.max_random_aspect_ratio,
            "rand_mirror": config.rand_mirror,
            "shuffle": True,
            "seed": seed,
            "seed_aug": seed,
        }

    def _val_options(self) -> Dict[str, Any]:
        """Return the options for resizing the shorter side; the centre crop is MXNet's default."""
        return {"resize": self._config.resize}

    def _reset(self) -> None:
        """Go to the start of the shard. MXNet reads ahead: an error may be reported only here."""
        try:
            self._iterator.reset()
        except mx.MXNetError as error:
            raise self._shard.read_error(_reason(error)) from None

    def _next_batch(self, num_valid: int) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return the next batch; start again at the end of the shard.

        Args:
            num_valid: images at the start of the batch that are not padding.
        """
        start = time.perf_counter()
        try:
            try:
                batch = self._iterator.next()
            except StopIteration:
                self._reset()
                batch = self._iterator.next()
        except mx.MXNetError as error:
            raise self._shard.read_error(_reason(error)) from None
        labels = batch.label[0].asnumpy()[:num_valid]
        self.wait_seconds += time.perf_counter() - start
        position = find_wrong_label(labels, self._shard.num_classes)
        if position is not None:
            raise label_error(self._shard, float(labels[position]))
        return self._to_input_format(batch.data[0]), batch.label[0]

    def _to_input_format(self, image: mx.nd.NDArray) -> mx.nd.NDArray:
        """Convert float32 (batch, 3, H, W) to the network's channels, layout and dtype."""
        config = self._config
        image = image.as_in_context(self._device)
        if config.image_shape[0] == 4:
            batch_size, _, height, width = image.shape
            padding = mx.nd.zeros((batch_size, 1, height, width), ctx=self._device)
            image = mx.nd.concat(image, padding, dim=1)
        if config.input_layout == "NHWC":
            image = image.transpose((0, 2, 3, 1))
        return image.astype(config.input_dtype, copy=False)


def _reason(error: mx.MXNetError) -> str:
    """Return the line of MXNet's multi-line message that contains the reason."""
    for line in str(error).splitlines():
        if "rror" in line or "failed" in line:
            return line.split("Check failed: ")[-1].strip()
    return str(error).strip()
