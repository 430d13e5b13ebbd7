# SPDX-License-Identifier: Apache-2.0
"""The input pipelines in DALI, on a GPU or all on the CPU. The only place that knows DALI.

Source of the graph and its numbers: NVIDIA's v2.1 MXNet benchmark. DALI's resize antialiases by default, which is what
the published accuracies were reached with; OpenCV-based iterators do not.
"""

from __future__ import annotations

import collections
import ctypes
import re
from typing import Any, Deque, Dict, Iterator, List, Optional, Tuple

import mxnet as mx
import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from mxresnet.config import Config
from mxresnet.data.dataset import DAMAGED
from mxresnet.errors import UserError

MEAN = [255 * value for value in (0.485, 0.456, 0.406)]
STD = [255 * value for value in (0.229, 0.224, 0.225)]
RANDOM_CROP_ATTEMPTS = 10
READER = "reader"
_LENT_ON_CPU = 2  # batches of DALI's memory that MXNet may read at a time


def _decoder_options(config: Config, on_gpu: bool, cached: bool = False) -> dict:
    if not on_gpu:
        return {"device": "cpu"}
    padding_bytes = config.dali_nvjpeg_memory_padding * 2**20
    options = {
        "device": "mixed",
        "device_memory_padding": padding_bytes,
        "host_memory_padding": padding_bytes,
        "hw_decoder_load": config.dali_hw_decoder_load,
        "preallocate_width_hint": config.dali_preallocate_width,
        "preallocate_height_hint": config.dali_preallocate_height,
        "bytes_per_sample_hint": config.dali_decoder_buffer_hint,
    }
    if cached:
        # Threshold 0: every image is kept, until the cache is full.
        options.update(cache_size=config.dali_cache_size, cache_type="threshold", cache_threshold=0)
    return options


def _hint(name: str, size_bytes: int, on_gpu: bool) -> dict:
    return {name: size_bytes} if on_gpu else {}


def _normalized(images: Any, config: Config, on_gpu: bool, **mirror: Any) -> Any:
    channels, height, width = config.image_shape
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT16 if config.input_dtype == "float16" else types.FLOAT,
        output_layout=config.input_layout.strip("N"),
        crop=(height, width),
        mean=MEAN,
        std=STD,
        pad_output=channels == 4,
        **mirror,
        **_hint("bytes_per_sample_hint", config.dali_normalize_buffer_hint, on_gpu),
    )


def _train_images(jpegs: Any, config: Config, on_gpu: bool) -> Any:
    """A random area of random aspect ratio, resized to the input size and mirrored half of the time."""
    _, height, width = config.image_shape
    crop = {
        "random_area": [config.min_random_area, config.max_random_area],
        "random_aspect_ratio": [config.min_random_aspect_ratio, config.max_random_aspect_ratio],
        "num_attempts": RANDOM_CROP_ATTEMPTS,
    }
    cached = on_gpu and config.dali_cache_size > 0
    decoder = _decoder_options(config, on_gpu, cached)
    scratch = _hint("temp_buffer_hint", config.dali_tmp_buffer_hint, on_gpu)
    if config.dali_roi_decode and not cached:
        images = fn.decoders.image_random_crop(jpegs, output_type=types.RGB, **crop, **decoder)
        resized = _hint("bytes_per_sample_hint", config.dali_decoder_buffer_hint, on_gpu)
        images = fn.resize(images, resize_x=width, resize_y=height, **resized, **scratch)
    else:
        images = fn.decoders.image(jpegs, output_type=types.RGB, **decoder)
        cropped = _hint("bytes_per_sample_hint", config.dali_crop_buffer_hint, on_gpu)
        images = fn.random_resized_crop(images, size=(height, width), **crop, **cropped, **scratch)
    mirror = fn.random.coin_flip(probability=0.5) if config.rand_mirror else 0
    return _normalized(images, config, on_gpu, mirror=mirror)


def _val_images(jpegs: Any, config: Config, on_gpu: bool) -> Any:
    """The shorter side resized, then the centre."""
    images = fn.decoders.image(jpegs, output_type=types.RGB, **_decoder_options(config, on_gpu))
    return _normalized(fn.resize(images, resize_shorter=config.resize), config, on_gpu)


def shard_sizes(examples: int, ranks: int) -> List[int]:
    """Images in each of DALI's shards, which are cut at floor(examples * rank / ranks)."""
    bounds = [examples * rank // ranks for rank in range(ranks + 1)]
    return [end - start for start, end in zip(bounds, bounds[1:])]


def build(
    config: Config,
    paths: Dict[str, str],
    rank: int,
    ranks: int,
    device_id: Optional[int],
    seed: int,
    training: bool,
) -> Pipeline:
    """The pipeline of one rank, whose outputs are images and labels (batch, 1); without a device_id all on the CPU."""
    part = "data_train" if training else "data_val"
    on_gpu = device_id is not None
    cached = on_gpu and config.dali_cache_size > 0
    pipe = Pipeline(
        batch_size=config.batch_size * (config.input_batch_multiplier if training else 1),
        num_threads=config.dali_threads,
        device_id=device_id,
        seed=seed,
        prefetch_queue_depth=config.dali_prefetch_queue + (0 if on_gpu else _LENT_ON_CPU - 1),
    )
    with pipe:
        # Validation shards stay with their rank and are padded, so that every image comes exactly once in each evaluation.
        # Training shards move on from rank to rank, unless decoded images are cached: the stream has no end and no padding.
        jpegs, labels = fn.readers.mxnet(
            path=[paths[part]],
            index_path=[paths[f"{part}_idx"]],
            random_shuffle=training,
            lazy_init=True,
            name=READER,
            dont_use_mmap=config.dali_dont_use_mmap,
            shard_id=rank,
            num_shards=ranks,
            pad_last_batch=not training,
            stick_to_shard=not training or cached,
            skip_cached_images=training and cached,
        )
        images = (_train_images if training else _val_images)(jpegs, config, on_gpu)
        pipe.set_outputs(images, labels)
    pipe.build()
    return pipe


class DaliIterator:
    """One pipeline. On a GPU its batches are copied into two arrays in turn; on a CPU, where a copy would take time from the
    decoder, MXNet reads them where DALI put them, two at a time.
    """

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
        part, what = ("data_train", "training") if training else ("data_val", "validation")
        self._where = f"rank {rank}, {what} data {config.path(part)}"
        self._rank, self._ranks = rank, ranks
        self._on_gpu = device.device_type == "gpu"
        self._pipe = build(
            config, paths, rank, ranks, device.device_id if self._on_gpu else None, seed, training
        )
        self._batch_size = self._pipe.max_batch_size
        shape = (self._batch_size, *config.batch_shape[1:])
        self._images = (
            [mx.nd.empty(shape, device, dtype=config.input_dtype) for _ in range(2)]
            if self._on_gpu
            else []
        )
        self._labels = [mx.nd.empty((self._batch_size, 1)) for _ in range(2)]
        self._lent: Deque[Any] = collections.deque()

    def examples(self) -> int:
        """Images in the whole file; opens it. Raises UserError when it cannot be read."""
        try:
            return self._pipe.reader_meta(READER)["epoch_size"]
        except RuntimeError as error:
            raise self._explained(error) from None

    def next(self) -> Tuple[Any, Any]:
        """Raises UserError when a record cannot be decoded."""
        if len(self._lent) == _LENT_ON_CPU:
            _wait_until_read(self._lent.popleft())
            self._pipe.release_outputs()
        try:
            self._pipe.schedule_run()
            images, labels = (output.as_tensor() for output in self._pipe.share_outputs())
        except RuntimeError as error:
            raise self._explained(error) from None
        label = _copy(labels, self._labels).reshape((-1,))
        if self._on_gpu:
            image = _copy(images, self._images)
            self._pipe.release_outputs()
        else:
            image = mx.nd.from_numpy(np.asarray(images))
            self._lent.append(image)
        return image, label

    def evaluation(self) -> Iterator[Tuple[Any, Any, int]]:
        shards = shard_sizes(self.examples(), self._ranks)
        left = shards[self._rank]
        # Each rank reads as many batches as the largest shard has: DALI pads the others to that.
        for _ in range(-(-max(shards) // self._batch_size)):
            num_valid = min(self._batch_size, left)
            left -= num_valid
            yield (*self.next(), num_valid)

    def _explained(self, error: RuntimeError) -> UserError:
        """DALI's many lines as one: its reason, and the record where it says which."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reasons = [
            re.sub(r"^.*?\[[^\]]*\.(?:cc|h|cu):\d+\]\s*", "", line)
            for line in lines
            if re.search(r"\.(?:cc|h|cu):\d+\]", line)
        ]
        reason = "; ".join(dict.fromkeys(reasons)) or lines[0]
        return UserError(f"{self._where} cannot be used: {reason} {DAMAGED}")


def _wait_until_read(array: Any) -> None:
    """Wait until MXNet has done all that it was told to do with an array."""
    mx.base.check_call(mx.base._LIB.MXNDArrayWaitToWrite(array.handle))


def _copy(source: Any, targets: List[Any]) -> Any:
    """Copy a DALI tensor into the first of several NDArrays of its shape and type, which becomes the last; return it."""
    target = targets.pop(0)
    targets.append(target)
    _wait_until_read(target)
    pointer = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(target.handle, ctypes.byref(pointer)))
    source.copy_to_external(pointer)
    return target
