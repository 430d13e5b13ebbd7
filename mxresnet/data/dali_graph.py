# SPDX-License-Identifier: Apache-2.0
"""The graph of an input pipeline in DALI, on a GPU or entirely on the CPU.

The only module of mxresnet that imports DALI. It does not need MXNet.

Source of the graph and its constants: NVIDIA's MLPerf Training v2.1 MXNet benchmark. DALI's resize
antialiases by default, and the published accuracies were reached with that; iterators that resize
with OpenCV do not antialias.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional, Tuple

import nvidia.dali
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from mxresnet.config import Config
from mxresnet.data.shard import RecordShard

# ImageNet's mean and standard deviation of red, green and blue, in pixel values (0 to 255).
MEAN = [255 * value for value in (0.485, 0.456, 0.406)]
STD = [255 * value for value in (0.229, 0.224, 0.225)]
RANDOM_CROP_ATTEMPTS = 10
READER_NAME = "reader"
# The first version that saves the state of random_resized_crop.
FIRST_VERSION_WITH_STATE = (1, 34)
IMAGE_INPUT = "image"
# Batches in DALI's memory that MXNet may read at the same time, on the CPU.
SHARED_CPU_OUTPUTS = 2

DataNode = Any  # nvidia.dali.data_node.DataNode, an output of an operator in the graph
Options = Dict[str, Any]  # keyword arguments of an operator


def can_save_state() -> bool:
    """Return whether this DALI can save and restore the state of these pipelines."""
    numbers = re.findall(r"\d+", nvidia.dali.__version__)[:2]
    return tuple(map(int, numbers)) >= FIRST_VERSION_WITH_STATE


def define_pipeline(
    config: Config,
    shard: RecordShard,
    device_id: Optional[int],
    saves_state: bool = False,
    state: Optional[bytes] = None,
) -> Pipeline:
    """Return the DALI pipeline of one shard, not built: read, decode, crop, normalize.

    Its outputs are the images, of shape (batch, ...) as config.batch_shape, and the float32
    labels of shape (batch, 1). No file is opened before the first batch or reader_meta().
    The seed is the rank's plus the number of its GPU, as in the reference benchmark.

    Args:
        device_id: number of the GPU, or None to run entirely on the CPU.
        saves_state: whether Pipeline.checkpoint() will be called; needs can_save_state().
        state: what Pipeline.checkpoint() of such a pipeline returned, to continue after it.
    """
    options: Options = {"enable_checkpointing": True} if saves_state else {}
    if state is not None:
        options["checkpoint"] = state
    on_gpu = device_id is not None
    pipeline = Pipeline(
        batch_size=shard.batch_size,
        num_threads=config.dali_threads,
        device_id=device_id,
        seed=shard.seed + (device_id or 0),
        prefetch_queue_depth=config.dali_prefetch_queue + (0 if on_gpu else SHARED_CPU_OUTPUTS - 1),
        **options,
    )
    with pipeline:
        jpegs, labels = _read_records(config, shard, on_gpu)
        preprocess = _preprocess_train if shard.training else _preprocess_val
        pipeline.set_outputs(preprocess(jpegs, config, on_gpu), labels)
    return pipeline


def build_image_pipeline(config: Config) -> Pipeline:
    """Return a built pipeline on the CPU that preprocesses one image as in an evaluation.

    Its input IMAGE_INPUT is the content of an image file; its output has shape
    (1, *config.batch_shape[1:]).
    """
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name=IMAGE_INPUT)
        pipeline.set_outputs(_preprocess_val(encoded, config, on_gpu=False))
    pipeline.build()
    return pipeline


def build_pipeline(
    config: Config,
    shard: RecordShard,
    device_id: Optional[int],
    saves_state: bool = False,
    state: Optional[bytes] = None,
) -> Pipeline:
    """Return the pipeline of define_pipeline(), built: it allocates its memory on the device."""
    pipeline = define_pipeline(config, shard, device_id, saves_state, state)
    pipeline.build()
    return pipeline


def _read_records(config: Config, shard: RecordShard, on_gpu: bool) -> Tuple[DataNode, DataNode]:
    """Read encoded images and labels of one shard.

    Validation shards stay with their rank and are padded, so that each evaluation contains every
    image exactly once. Training shards move to the next rank after each epoch, unless decoded
    images are cached; the stream of training images has no end and no padding.
    """
    caches_images = _caches_decoded_images(config, on_gpu)
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
    """Decode, crop a random area, resize it, mirror half of the images, and normalize."""
    # The decoder that decodes only the crop cannot use the cache.
    if config.dali_roi_decode and not _caches_decoded_images(config, on_gpu):
        images = _decode_random_crop_and_resize(jpegs, config, on_gpu)
    else:
        images = _decode_and_random_resized_crop(jpegs, config, on_gpu)
    mirror = fn.random.coin_flip(probability=0.5) if config.rand_mirror else 0
    return _crop_mirror_normalize(images, config, on_gpu, mirror=mirror)


def _preprocess_val(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode, resize the shorter side to config.resize, crop the centre, normalize."""
    decoded = _decode(jpegs, config, on_gpu)
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
    return fn.random_resized_crop(
        _decode(jpegs, config, on_gpu),
        size=(height, width),
        **_random_crop_options(config),
        **_resize_hints(config, on_gpu),
    )


def _decode(jpegs: DataNode, config: Config, on_gpu: bool) -> DataNode:
    """Decode each image completely, or take it from the cache of decoded images on the GPU."""
    options = _decoder_options(config, on_gpu)
    if _caches_decoded_images(config, on_gpu):
        # Threshold 0: cache every image until the cache is full.
        options.update(cache_size=config.dali_cache_size, cache_type="threshold", cache_threshold=0)
    return fn.decoders.image(jpegs, output_type=types.DALIImageType.RGB, **options)


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
    """Return whether decoded images are kept in GPU memory (--dali-cache-size)."""
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
        "affine": False,  # otherwise each decoder thread stays on one core
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
