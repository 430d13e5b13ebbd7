# SPDX-License-Identifier: Apache-2.0
"""Batches of a DALI pipeline (dali_graph.py) as MXNet arrays."""

from __future__ import annotations

import collections
import ctypes
import re
import time
from typing import Any, Deque, Iterator, List, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data.dali_graph import (
    READER_NAME,
    SHARED_CPU_OUTPUTS,
    shard_sizes,
)
from mxresnet.data.dali_position import PipelinePosition
from mxresnet.data.record_file import check_record_file, find_wrong_label, label_error
from mxresnet.data.shard import RecordShard
from mxresnet.errors import UserError


class DaliIterator:
    """Batches of one DALI pipeline as MXNet arrays.

    On a GPU the images are copied into two MXNet arrays in turn. On the CPU, where a copy would
    take time from the decoder, MXNet reads them from DALI's memory, two batches at the same time.
    """

    def __init__(
        self,
        config: Config,
        shard: RecordShard,
        device: mx.Context,
        saves_state: bool = False,
        state: Optional[InputState] = None,
    ):
        """Build the pipeline; it reads nothing yet.

        Args:
            config: the settings.
            shard: what to read.
            device: MXNet context.
            saves_state: whether state() will be called.
            state: what an earlier iterator's state() returned, to continue after it.
        """
        self._shard = shard
        self.wait_seconds = 0.0
        self._on_gpu = device.device_type == "gpu"
        device_id = device.device_id if self._on_gpu else None
        self._position = PipelinePosition(shard, state)
        self._build = lambda: self._position.build(config, device_id, saves_state)
        self._pipeline = self._build()
        shape = (shard.batch_size, *config.batch_shape[1:])
        self._image_buffers = (
            [mx.nd.empty(shape, device, dtype=config.input_dtype) for _ in range(2)]
            if self._on_gpu
            else []
        )
        self._label_buffers = [mx.nd.empty((shard.batch_size, 1)) for _ in range(2)]
        self._shared_images: Deque[mx.nd.NDArray] = collections.deque()  # oldest first

    def num_examples(self) -> int:
        """Check the record file, open it, and return the number of its images, those of all shards.

        Raises:
            UserError: the records cannot be read or are damaged.
        """
        num_images = check_record_file(self._shard)
        if num_images < self._shard.num_ranks:
            raise self._shard.too_few_images(num_images)
        return self._epoch_size()

    def _epoch_size(self) -> int:
        try:
            return self._pipeline.reader_meta(READER_NAME)["epoch_size"]
        except RuntimeError as error:
            raise self._shard.read_error(_reason(error)) from None

    def next_train_batch(self) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Return the next images (batch, ...) and float32 labels (batch,).

        Raises:
            UserError: a record cannot be decoded, or its label is not the number of a class.
        """
        for _ in range(self._position.take_skipped_batches()):
            self._next_batch()
        try:
            batch = self._next_batch()
        except UserError as error:
            if not self._position.give_up(str(error)):
                raise
            self._pipeline = self._build()
            batch = self._next_batch()
        self._position.batches_since += 1
        return batch

    @property
    def restores_exactly(self) -> bool:
        """Whether an iterator with this one's state() continues with the same batches."""
        return self._position.is_exact

    def state(self) -> InputState:
        """Return the position after the last training batch."""
        return self._position.state(self._pipeline)

    def iterate_validation(self) -> Iterator[Tuple[mx.nd.NDArray, mx.nd.NDArray, int]]:
        """Yield (images, labels, num_valid) for one pass over this rank's shard.

        Every rank yields the number of batches of the largest shard; DALI pads the other shards.

        Raises:
            UserError: a record cannot be decoded, or its label is not the number of a class.
        """
        sizes = shard_sizes(self._epoch_size(), self._shard.num_ranks)
        batch_size, remaining = self._shard.batch_size, sizes[self._shard.rank]
        for _ in range(-(-max(sizes) // batch_size)):
            num_valid = min(batch_size, remaining)
            remaining -= num_valid
            yield (*self._next_batch(), num_valid)

    def _next_batch(self) -> Tuple[mx.nd.NDArray, mx.nd.NDArray]:
        if len(self._shared_images) == SHARED_CPU_OUTPUTS:
            _wait_for_pending_operations(self._shared_images.popleft())
            self._pipeline.release_outputs()
        start = time.perf_counter()
        try:
            self._pipeline.schedule_run()
            image_list, label_list = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise self._shard.read_error(_reason(error)) from None
        self.wait_seconds += time.perf_counter() - start
        images, labels = image_list.as_tensor(), self._checked_labels(image_list, label_list)
        label_array = _copy_to_next_buffer(labels, self._label_buffers).reshape((-1,))
        if self._on_gpu:
            image_array = _copy_to_next_buffer(images, self._image_buffers)
            self._pipeline.release_outputs()
        else:
            image_array = mx.nd.from_numpy(np.asarray(images))
            self._shared_images.append(image_array)
        return image_array, label_array

    def _checked_labels(self, images: Any, labels: Any) -> Any:
        """Return the labels as a DALI tensor (batch, 1).

        Args:
            images, labels: DALI tensor lists.
        """
        shard = self._shard
        tensor = labels.as_tensor() if labels.is_dense_tensor() else None
        if tensor is None or tensor.shape() != [shard.batch_size, 1]:
            raise shard.read_error("a record has more than one label")
        values = np.asarray(tensor).reshape(-1)
        position = find_wrong_label(values, shard.num_classes)
        if position is not None:
            source = re.search(r" at index (\d+)$", images[position].source_info())
            offset = int(source.group(1)) if source else None
            raise label_error(shard, float(values[position]), offset)
        return tensor


def _reason(error: RuntimeError) -> str:
    """Return the reasons in DALI's multi-line message as one line.

    DALI writes a reason as "[path/file.cc:123] reason". If no line has this form, the first line is
    returned.
    """
    source_position = r"^.*?\[[^\]]*\.(?:cc|h|cu):\d+\]\s*"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [
        re.sub(source_position, "", line)
        for line in lines
        if re.search(r"\.(?:cc|h|cu):\d+\]", line)
    ]
    return "; ".join(dict.fromkeys(reasons)) or lines[0]


def _wait_for_pending_operations(array: mx.nd.NDArray) -> None:
    """Wait until MXNet has finished every operation queued on the array, reads included."""
    mx.base.check_call(mx.base._LIB.MXNDArrayWaitToWrite(array.handle))


def _copy_to_next_buffer(tensor: Any, buffers: List[mx.nd.NDArray]) -> mx.nd.NDArray:
    """Copy a DALI tensor into the first buffer, move that buffer to the end, and return it.

    Args:
        tensor: a DALI tensor with the shape, dtype and device type of the buffers.
        buffers: NDArrays that are used in turn.
    """
    buffer = buffers.pop(0)
    buffers.append(buffer)
    _wait_for_pending_operations(buffer)
    pointer = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(buffer.handle, ctypes.byref(pointer)))
    tensor.copy_to_external(pointer)
    return buffer
