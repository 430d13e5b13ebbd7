# SPDX-License-Identifier: Apache-2.0
"""The input pipelines in DALI, on a GPU or all on the CPU. The only place that knows DALI.

Source of the graph and its numbers: NVIDIA's v2.1 MXNet benchmark. DALI's resize antialiases by default, which is what
the published accuracies were reached with; OpenCV-based iterators do not.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any, Iterator, List, Tuple

import mxnet as mx
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from mxresnet.config import Config, UserError
from mxresnet.dataset import DataSet
from mxresnet.distributed import World
from mxresnet.pipeline import Batch

MEAN = [255 * value for value in (0.485, 0.456, 0.406)]
STD = [255 * value for value in (0.229, 0.224, 0.225)]
RANDOM_CROP_ATTEMPTS = 10
READER = "reader"


def _decoder_options(config: Config, on_gpu: bool) -> dict:
    if not on_gpu:
        return {"device": "cpu"}
    padding_bytes = config.dali_nvjpeg_memory_padding * 2**20
    return {
        "device": "mixed", "device_memory_padding": padding_bytes, "host_memory_padding": padding_bytes,
        "hw_decoder_load": config.dali_hw_decoder_load}


def _normalized(images: Any, config: Config, **mirror: Any) -> Any:
    channels, height, width = config.image_shape
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT16 if config.dtype == "float16" else types.FLOAT, output_layout=config.input_layout.strip("N"),
        crop=(height, width), mean=MEAN, std=STD, pad_output=channels == 4, **mirror)


def _train_images(jpegs: Any, config: Config, on_gpu: bool) -> Any:
    """A random area of random aspect ratio, resized to the input size and mirrored half of the time."""
    _, height, width = config.image_shape
    crop = {
        "random_area": [config.min_random_area, config.max_random_area],
        "random_aspect_ratio": [config.min_random_aspect_ratio, config.max_random_aspect_ratio],
        "num_attempts": RANDOM_CROP_ATTEMPTS}
    decoder = _decoder_options(config, on_gpu)
    if config.dali_roi_decode:
        images = fn.decoders.image_random_crop(jpegs, output_type=types.RGB, **crop, **decoder)
        images = fn.resize(images, resize_x=width, resize_y=height)
    else:
        images = fn.decoders.image(jpegs, output_type=types.RGB, **decoder)
        images = fn.random_resized_crop(images, size=(height, width), **crop)
    mirror = fn.random.coin_flip(probability=0.5) if config.rand_mirror else 0
    return _normalized(images, config, mirror=mirror)


def _val_images(jpegs: Any, config: Config, on_gpu: bool) -> Any:
    """The shorter side resized, then the centre."""
    images = fn.decoders.image(jpegs, output_type=types.RGB, **_decoder_options(config, on_gpu))
    return _normalized(fn.resize(images, resize_shorter=config.resize), config)


class _Stream:
    """One DALI pipeline whose batches are copied into two MXNet batches in turn."""

    def __init__(self, config: Config, world: World, device: Any, seed: int, training: bool):
        self._records = config.path("data_train" if training else "data_val")
        index = config.path("data_train_idx" if training else "data_val_idx")
        self._where = f"rank {world.rank}, {'training' if training else 'validation'} data"
        on_gpu = device.device_type == "gpu"
        self._pipe = Pipeline(
            batch_size=config.batch_size, num_threads=config.dali_threads, device_id=device.device_id if on_gpu else None,
            seed=seed, prefetch_queue_depth=config.dali_prefetch_queue)
        with self._pipe:
            # Validation shards stay with their rank and are padded, so that every image comes exactly once in each
            # evaluation. Training shards move on from rank to rank: the stream has no end and no padding.
            jpegs, labels = fn.readers.mxnet(
                path=[self._records], index_path=[index], random_shuffle=training, lazy_init=True, name=READER,
                dont_use_mmap=config.dali_dont_use_mmap, shard_id=world.rank, num_shards=world.size,
                pad_last_batch=not training, stick_to_shard=not training)
            images = (_train_images if training else _val_images)(jpegs, config, on_gpu)
            self._pipe.set_outputs(images, labels)
        self._pipe.build()
        self._buffers = [
            (mx.nd.empty(config.batch_shape, device, dtype=config.dtype), mx.nd.empty((config.batch_size, 1)))
            for _ in range(2)]

    def examples(self) -> int:
        """Images in the whole file; opens it."""
        try:
            return self._pipe.reader_meta(READER)["epoch_size"]
        except RuntimeError as error:
            raise self._explained(error) from None

    def next(self, real: int) -> Batch:
        try:
            images, labels = self._pipe.run()
        except RuntimeError as error:
            raise self._explained(error) from None
        image, label = self._buffers[0]
        self._buffers.reverse()
        _copy(images.as_tensor(), image)
        _copy(labels.as_tensor(), label)
        return Batch(image, label.reshape((-1,)), real)

    def _explained(self, error: RuntimeError) -> UserError:
        """DALI's many lines as one: its reason, and the record where it says which."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [re.sub(r"^.*?\[[^\]]*\.(?:cc|h|cu):\d+\]\s*", "", line) for line in lines if re.search(r"\.(?:cc|h|cu):\d+\]", line)]
        reason = "; ".join(dict.fromkeys(reasons)) or lines[0]
        return UserError(
            f"{self._where} {self._records} cannot be used: {reason} (python -m prepare.verify finds the damaged record)")


def _copy(source: Any, target: Any) -> None:
    """Copy a DALI tensor into an NDArray of the same shape and type, once MXNet no longer reads what is there."""
    mx.base.check_call(mx.base._LIB.MXNDArrayWaitToWrite(target.handle))
    pointer = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(target.handle, ctypes.byref(pointer)))
    source.copy_to_external(pointer)


class Train:
    """Endless training batches of this rank's shards."""

    def __init__(self, stream: _Stream, batch_size: int):
        self._stream, self._batch_size = stream, batch_size

    def batches(self, steps: int) -> Iterator[Batch]:
        for _ in range(steps):
            yield self._stream.next(self._batch_size)


class Validation:
    """This rank's share of the validation set, once a call."""

    def __init__(self, stream: _Stream, batch_size: int, shards: List[int], rank: int):
        self._stream, self._batch_size = stream, batch_size
        self._mine = shards[rank]
        # Each rank reads as many batches as the largest shard has: DALI pads the others to that.
        self._batches = -(-max(shards) // batch_size)

    def batches(self) -> Iterator[Batch]:
        left = self._mine
        for _ in range(self._batches):
            real = min(self._batch_size, left)
            left -= real
            yield self._stream.next(real)


def shard_sizes(examples: int, ranks: int) -> List[int]:
    """Images in each of DALI's shards, which are cut at floor(examples * rank / ranks)."""
    bounds = [examples * rank // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in zip(bounds, bounds[1:])]


class Pipelines:
    """Both pipelines of a rank, built but not opened: nothing of the data is read before open()."""

    def __init__(self, config: Config, dataset: DataSet, world: World, device: Any, seed: int):
        self._config, self._dataset, self._world = config, dataset, world
        self._train = _Stream(config, world, device, seed, training=True)
        self._val = _Stream(config, world, device, seed, training=False)

    def open(self) -> Tuple[Train, Validation]:
        """Read the indices and compare the counts. Raises UserError when they are not what was promised."""
        batch_size, data = self._config.batch_size, self._dataset
        train_examples, val_examples = self._train.examples(), self._val.examples()
        if train_examples < data.train_examples or val_examples != data.val_examples:
            raise UserError(
                f"the data set has {train_examples} training and {val_examples} validation images, "
                f"not {data.train_examples} and {data.val_examples}: set --num-examples and --num-val-examples, or make it again")
        shards = shard_sizes(val_examples, self._world.size)
        return Train(self._train, batch_size), Validation(self._val, batch_size, shards, self._world.rank)
