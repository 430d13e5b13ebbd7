# SPDX-License-Identifier: Apache-2.0
"""Input pipelines in DALI, on a GPU or entirely on the CPU. The only module that imports DALI.

Source of the graph and its constants: NVIDIA's MLPerf Training v2.1 MXNet benchmark. DALI's resize
antialiases by default, and the published accuracies were reached with that; iterators that resize
with OpenCV do not antialias.
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
from mxresnet.data.record_file import check_record_file, find_wrong_label, label_error
from mxresnet.data.shard import RecordShard

# ImageNet's mean and standard deviation of red, green and blue, in pixel values (0 to 255).
MEAN = [255 * value for value in (0.485, 0.456, 0.406)]
STD = [255 * value for value in (0.229, 0.224, 0.225)]
RANDOM_CROP_ATTEMPTS = 10
READER_NAME = "reader"
# Batches in DALI's memory that MXNet may read at the same time, on the CPU.
_SHARED_CPU_OUTPUTS = 2

DataNode = Any  # nvidia.dali.data_node.DataNode, an output of an operator in the graph
Options = Dict[str, Any]  # keyword arguments of an operator


def define_pipeline(config: Config, shard: RecordShard, device_id: Optional[int]) -> Pipeline:
    """Return the DALI pipeline of one shard, not built: read, decode, crop, normalize.

    Its outputs are the images, of shape (batch, ...) as config.batch_shape, and the float32
    labels of shape (batch, 1). No file is opened before the first batch or reader_meta().
    The seed is the rank's plus the number of its GPU, as in the reference benchmark.

    Args:
        device_id: number of the GPU, or None to run entirely on the CPU.
    """
    on_gpu = device_id is not None
    pipeline = Pipeline(
        batch_size=shard.batch_size,
        num_threads=config.dali_threads,
        device_id=device_id,
        seed=shard.seed + (device_id or 0),
        prefetch_queue_depth=config.dali_prefetch_queue
        + (0 if on_gpu else _SHARED_CPU_OUTPUTS - 1),
    )
    with pipeline:
        jpegs, labels = _read_records(config, shard, on_gpu)
        preprocess = _preprocess_train if shard.training else _preprocess_val
        pipeline.set_outputs(preprocess(jpegs, config, on_gpu), labels)
    return pipeline


def build_pipeline(config: Config, shard: RecordShard, device_id: Optional[int]) -> Pipeline:
    """Return the pipeline of define_pipeline(), built: it allocates its memory on the device."""
    pipeline = define_pipeline(config, shard, device_id)
    pipeline.build()
    return pipeline


def _read_records(config: Config, shard: RecordShard, on_gpu: bool) -> Tuple[DataNode, DataNode]:
    """Read encoded images and labels of one shard.

    Validation shards stay with their rank and are padded, so that each evaluation contains every
    image exactly once. Training shards move to the next rank after each epoch, unless decoded
    images are cached; the stream of training images has no end and no padding.
    """
    caches_images = shard.training and _caches_decoded_images(config, on_gpu)
    jpegs, labels = fn.readers.mxnet(
        path=[shard.records_path],
        index_path=[shard.index_path],
        random_shuffle=shard.training,
        lazy_init=True,
        name=READER_NAME,
        dont_use_mmap=config.dali_dont_use_mmap,
        shard_id=shard.rank,
        num_shards=shard.num_ranks,
        pad_last_batch=not shard.training,
        stick_to_shard=not shard.training or caches_images,
        skip_cached_images=caches_images,
    )
    return jpegs, labels


def _preprocess_train(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode, crop a random area, resize it to the input size, mirror half, and normalize."""
    # The decoder that decodes only the crop cannot use the cache.
    if config.dali_roi_decode and not _caches_decoded_images(config, on_gpu):
        images = _decode_random_crop_and_resize(jpegs, config, on_gpu)
    else:
        images = _decode_and_random_resized_crop(jpegs, config, on_gpu)
    mirror = fn.random.coin_flip(probability=0.5) if config.rand_mirror else 0
    return _crop_mirror_normalize(images, config, on_gpu, mirror=mirror)


def _preprocess_val(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode, resize the shorter side to config.resize, crop the centre, normalize."""
    decoded = fn.decoders.image(
        jpegs, output_type=types.DALIImageType.RGB, **_decoder_options(config, on_gpu)
    )
    resized = fn.resize(decoded, resize_shorter=config.resize, **_resize_hints(config, on_gpu))
    return _crop_mirror_normalize(resized, config, on_gpu)


def _decode_random_crop_and_resize(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode only the random crop of each image, then resize it to the input size."""
    _, height, width = config.image_shape
    images = fn.decoders.image_random_crop(
        jpegs,
        output_type=types.DALIImageType.RGB,
        **_random_crop_options(config),
        **_decoder_options(config, on_gpu),
    )
    return fn.resize(
        images,
        resize_x=width,
        resize_y=height,
        **_gpu_memory_hint("bytes_per_sample_hint", config.dali_decoder_buffer_hint, on_gpu),
    )


def _decode_and_random_resized_crop(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode each image completely, then crop a random area and resize it to the input size."""
    _, height, width = config.image_shape
    decoder_options = _decoder_options(config, on_gpu)
    if _caches_decoded_images(config, on_gpu):
        # Threshold 0: cache every image until the cache is full.
        decoder_options.update(
            cache_size=config.dali_cache_size, cache_type="threshold", cache_threshold=0
        )
    images = fn.decoders.image(jpegs, output_type=types.DALIImageType.RGB, **decoder_options)
    return fn.random_resized_crop(
        images,
        size=(height, width),
        **_random_crop_options(config),
        **_resize_hints(config, on_gpu),
    )


def _crop_mirror_normalize(
    images: DataNode, config: Config, on_gpu: bool, **mirror: Any
) -> DataNode:
    """Crop the centre to the input size, mirror where mirror is 1, return (pixel - MEAN) / STD."""
    channels, height, width = config.image_shape
    return fn.crop_mirror_normalize(
        images,
        dtype=types.DALIDataType.FLOAT16
        if config.input_dtype == "float16"
        else types.DALIDataType.FLOAT,
        output_layout=config.input_layout.strip("N"),
        crop=(height, width),
        mean=MEAN,
        std=STD,
        pad_output=channels == 4,
        **mirror,
        **_gpu_memory_hint("bytes_per_sample_hint", config.dali_normalize_buffer_hint, on_gpu),
    )


def _caches_decoded_images(config: Config, on_gpu: bool) -> bool:
    """Return whether training keeps decoded images in GPU memory (--dali-cache-size)."""
    return on_gpu and config.dali_cache_size > 0


def _random_crop_options(config: Config) -> Options:
    return {
        "random_area": [config.min_random_area, config.max_random_area],
        "random_aspect_ratio": [config.min_random_aspect_ratio, config.max_random_aspect_ratio],
        "num_attempts": RANDOM_CROP_ATTEMPTS,
    }


def _decoder_options(config: Config, on_gpu: bool) -> Options:
    if not on_gpu:
        return {"device": "cpu"}
    padding_bytes = config.dali_nvjpeg_memory_padding * 2**20
    return {
        "device": "mixed",
        "device_memory_padding": padding_bytes,
        "host_memory_padding": padding_bytes,
        "hw_decoder_load": config.dali_hw_decoder_load,
        "preallocate_width_hint": config.dali_preallocate_width,
        "preallocate_height_hint": config.dali_preallocate_height,
        "bytes_per_sample_hint": config.dali_decoder_buffer_hint,
    }


def _resize_hints(config: Config, on_gpu: bool) -> Options:
    """Return the memory hints of an operator that resizes whole images."""
    return {
        **_gpu_memory_hint("bytes_per_sample_hint", config.dali_crop_buffer_hint, on_gpu),
        **_gpu_memory_hint("temp_buffer_hint", config.dali_tmp_buffer_hint, on_gpu),
    }


def _gpu_memory_hint(name: str, size_bytes: int, on_gpu: bool) -> Options:
    return {name: size_bytes} if on_gpu else {}


def shard_sizes(num_examples: int, num_ranks: int) -> List[int]:
    """Return the number of images in each of DALI's shards.

    DALI starts the shard of a rank at floor(num_examples * rank / num_ranks).
    """
    starts = [num_examples * rank // num_ranks for rank in range(num_ranks + 1)]
    return [end - start for start, end in zip(starts, starts[1:])]


class DaliIterator:
    """Batches of one DALI pipeline as MXNet arrays.

    On a GPU the images are copied into two MXNet arrays in turn. On the CPU, where a copy would
    take time from the decoder, MXNet reads them from DALI's memory, two batches at the same time.
    """

    def __init__(self, config: Config, shard: RecordShard, device: mx.Context):
        self._shard = shard
        self._on_gpu = device.device_type == "gpu"
        self._pipeline = build_pipeline(config, shard, device.device_id if self._on_gpu else None)
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
        check_record_file(self._shard)
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
        return self._next_batch()

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
        if len(self._shared_images) == _SHARED_CPU_OUTPUTS:
            _wait_for_pending_operations(self._shared_images.popleft())
            self._pipeline.release_outputs()
        try:
            self._pipeline.schedule_run()
            image_list, label_list = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise self._shard.read_error(_reason(error)) from None
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
