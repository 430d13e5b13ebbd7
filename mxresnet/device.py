# SPDX-License-Identifier: Apache-2.0
"""The device that a rank computes on: the CPU, or one of the GPUs of its machine."""

from __future__ import annotations

import ctypes
from typing import Any, List, MutableMapping, Optional, Sequence

import mxnet as mx

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.memory import memory_of_rank
from mxresnet.parallel.world import World

_CUDA_DRIVER = "libcuda.so.1"
_CUDA_COMPILER = "libnvrtc.so.11.2"  # the name that MXNet's CUDA 11 packages load
_UUID_BYTES = 16
_OLDEST_CUDA = 11000  # as cuDriverGetVersion() encodes CUDA 11.0
FUSION = "MXNET_USE_FUSION"


def choose_device(config: Config, world: World) -> Any:
    """Return this rank's MXNet context. Every rank of a machine must call this.

    Raises:
        UserError: the settings need a GPU that is missing, or do not fit the device.
    """
    if mx.runtime.Features().is_enabled("CUDA"):
        check_driver()
    num_found = mx.context.num_gpus()
    gpus = [int(gpu) for gpu in config.gpus.split(",")] if config.gpus else list(range(num_found))
    ids = visible_gpu_ids() if gpus else []
    visible = world.gather_on_machine([ids[gpu] for gpu in gpus if gpu < len(ids)])
    if not gpus:
        return _cpu(config)
    if config.dtype == "bfloat16":
        raise UserError("--dtype bfloat16 is for CPUs: use --dtype float16 on a GPU")
    index = gpu_index(visible, world.local_rank)
    if index >= len(gpus):
        raise UserError(
            f"{len(gpus)} GPUs for rank {world.local_rank} of this machine: start fewer ranks or "
            "see --gpus"
        )
    return mx.gpu(gpus[index])


def has_gpu() -> bool:
    """Return whether MXNet finds a GPU."""
    return mx.context.num_gpus() > 0


def memory_bytes(device: Any, world: World) -> int:
    """Return the memory of this rank's device, on a CPU the rank's share of it."""
    if device.device_type == "cpu":
        return memory_of_rank(world.local_size)
    _, total = mx.context.gpu_memory_info(device.device_id)
    return int(total)


def _cpu(config: Config) -> Any:
    """Return the context of the CPU.

    Raises:
        UserError: the settings need a GPU.
    """
    if config.dtype == "float16":
        raise UserError(
            f"--dtype {config.dtype} needs a GPU and none is found: use --dtype float32 or bfloat16"
        )
    # On a CPU, MXNet's channel-last convolution is not implemented and its batch norm sometimes
    # crashes.
    if "NHWC" in (config.conv_layout, config.batchnorm_layout, config.pooling_layout):
        raise UserError(
            "--conv-layout, --batchnorm-layout and --pooling-layout NHWC need a GPU and none is "
            "found: use NCHW"
        )
    return mx.cpu()


def gpu_index(visible: Sequence[Sequence[str]], local_rank: int) -> int:
    """Return the index of a rank's GPU among the GPUs that the rank sees.

    Ranks that see the same GPUs take one each, in order. A scheduler may instead show each rank
    GPUs of its own (srun --gpus-per-task); such a rank takes its first.

    Args:
        visible: identities of the GPUs that each rank of the machine sees, by local rank; no
            identities if they are not known.
        local_rank: number of the rank among those of its machine.

    Raises:
        UserError: the ranks see different GPUs, and share some of them.
    """
    if all(list(gpus) == list(visible[0]) for gpus in visible):
        return local_rank
    everything = [gpu for gpus in visible for gpu in gpus]
    if len(set(everything)) < len(everything):
        raise UserError(
            "the ranks of this machine see different GPUs, and share some of them: show all GPUs "
            "to every rank, or to each rank its own (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)"
        )
    return 0


def visible_gpu_ids() -> List[str]:
    """Return the UUIDs of the GPUs that this process sees, in CUDA's order.

    Returns an empty list if the driver cannot be asked. This does not create a context on a GPU.
    """
    try:
        cuda = ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    # The first version returns the UUID of the whole GPU for each of its parts (MIG).
    get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
    ids = []
    for ordinal in range(count.value):
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * _UUID_BYTES)()
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or get_uuid(uuid, device):
            return []
        ids.append(bytes(uuid).hex())
    return ids


def check_driver() -> None:
    """Check that the NVIDIA driver, if there is one, is new enough for CUDA 11.

    Raises:
        UserError: the driver is too old.
    """
    driver = ctypes.c_int()
    try:
        ctypes.CDLL(_CUDA_DRIVER).cuDriverGetVersion(ctypes.byref(driver))
    except (OSError, AttributeError):  # none, or one that stands in for it while an image is built
        return
    if 0 < driver.value < _OLDEST_CUDA:
        supported = _cuda_text(driver.value)
        raise UserError(
            f"the NVIDIA driver supports CUDA {supported}, and MXNet needs CUDA 11.0: install "
            "driver 450 or newer (520 or newer to fuse operators)"
        )


def _cuda_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def disable_unsupported_fusion(device: Any, environ: MutableMapping[str, str]) -> Optional[str]:
    """Turn MXNET_USE_FUSION off if the driver is too old for it; return a note if so.

    MXNet compiles fused pointwise operators to PTX, at run time. A driver accepts the PTX of its
    own CUDA version and of earlier ones only.

    Args:
        device: MXNet context.
        environ: the variables of this process, os.environ; it may change.
    """
    if device.device_type != "gpu" or environ.get(FUSION) == "0":
        return None
    driver, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        ctypes.CDLL(_CUDA_DRIVER).cuDriverGetVersion(ctypes.byref(driver))
        ctypes.CDLL(_CUDA_COMPILER).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except OSError:
        return None
    if driver.value >= 1000 * major.value + 10 * minor.value:
        return None
    environ[FUSION] = "0"
    return (
        f"{FUSION}: off, because this driver supports CUDA {_cuda_text(driver.value)} and operators"
        f" would be compiled by CUDA {major.value}.{minor.value} (driver 520 supports 11.8)"
    )


def check_device(device: Any) -> None:
    """Run a kernel, because the public MXNet packages have code for some GPU generations only.

    Raises:
        UserError: MXNet cannot use the device.
    """
    try:
        mx.nd.zeros((1,), device).asnumpy()
    except mx.MXNetError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        reasons = [line for line in lines if "rror" in line or "Check failed" in line]
        reason = (reasons or [str(error).strip()])[-1][:200]
        raise UserError(
            f"MXNet {mx.__version__} cannot use {device}: {reason}; the public GPU package "
            "supports compute capabilities 5.0 to 8.6 (Maxwell to Ampere), not Hopper or later"
        ) from None
