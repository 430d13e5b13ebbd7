# SPDX-License-Identifier: Apache-2.0
"""Estimate the memory that a rank needs at least, to refuse a batch that cannot fit.

Without the check, the system ends such a run without a reason, or after minutes of swapping.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from typing import Any, Dict, Iterator, Sequence, Tuple

from mxresnet.config import Config
from mxresnet.errors import UserError

CGROUP_ROOT = "/sys/fs/cgroup"
CGROUP_LIST = "/proc/self/cgroup"
MIN_RANK_BYTES = 400 * 2**20  # measured: 550 MiB with the smallest network
_GIB = 2**30
_MAX_ELEMENTS = 2**31 - 1  # of an array, in MXNet's public packages


def check_memory(config: Config, network: Any, memory_bytes: int) -> None:
    """Raise UserError if the network and the batches of these settings cannot fit.

    Args:
        config: the settings.
        network: MXNet symbol of the training network.
        memory_bytes: memory that this rank may use on its device.
    """
    largest, network_bytes = _network_size(config, network)
    if largest > _MAX_ELEMENTS:
        raise UserError(
            f"--batch-size {config.batch_size}: the network has an array of {largest} elements, "
            f"and MXNet's limit is {_MAX_ELEMENTS}: use a smaller batch or --image-shape"
        )
    batches_bytes = _input_bytes(config)
    if network_bytes + batches_bytes > memory_bytes:
        raise UserError(
            f"--batch-size {config.batch_size}: a rank needs at least "
            f"{network_bytes / _GIB:,.1f} GiB for the network and {batches_bytes / _GIB:,.1f} GiB "
            f"for batches of images, and has {memory_bytes / _GIB:,.1f} GiB: use a smaller batch, "
            "--resize, --dali-prefetch-queue or --input-batch-multiplier, or fewer ranks"
        )


def _network_size(config: Config, network: Any) -> Tuple[int, int]:
    """Return the elements of the largest array, and the bytes that training keeps at least.

    Those are parameters, gradients and momenta, and the inputs of convolutions and dense layers,
    which the backward pass reads. What else is kept depends on the operators.
    """
    internals = network.get_internals()
    shapes = {"data": config.batch_shape, "softmax_label": (config.batch_size,)}
    arguments, outputs, _ = internals.infer_shape(**shapes)
    elements = {
        name: _elements(shape) for name, shape in zip(internals.list_outputs(), outputs) if shape
    }
    itemsize = 4 if config.dtype == "float32" else 2
    kept = sum(elements.get(name, 0) for name in set(_matrix_inputs(internals)))
    parameters = sum(
        _elements(shape)
        for name, shape in zip(internals.list_arguments(), arguments)
        if name not in shapes
    )
    return max(elements.values()), kept * itemsize + parameters * 3 * 4


def _elements(shape: Sequence[int]) -> int:
    return math.prod(map(int, shape))


def _matrix_inputs(internals: Any) -> Iterator[str]:
    """Yield the names of the arrays that convolutions and dense layers read."""
    nodes = json.loads(internals.tojson())["nodes"]
    for node in nodes:
        if "Convolution" in node["op"] or node["op"] == "FullyConnected":
            source = nodes[node["inputs"][0][0]]
            yield source["name"] + ("" if source["op"] == "null" else "_output")


def _input_bytes(config: Config) -> int:
    """Return the size of the batches that the input pipelines of a rank hold."""
    itemsize = 2 if config.input_dtype == "float16" else 4
    batch = _elements(config.batch_shape) * itemsize
    train_batch = batch * config.input_batch_multiplier
    if config.synth_data:
        return train_batch
    resized = config.batch_size * config.resize**2 * 3  # validation images before the crop, uint8
    return config.dali_prefetch_queue * (train_batch + batch) + resized


def check_memory_of_ranks(ranks: int) -> None:
    """Raise UserError if a number of ranks cannot start on this machine."""
    if memory_of_rank(ranks) < MIN_RANK_BYTES:
        raise UserError(
            f"DGXNGPU={ranks}: each rank needs at least {MIN_RANK_BYTES >> 20} MiB, and "
            f"{memory_of_rank(1) >> 20} MiB are for all of them: start fewer ranks"
        )


def memory_of_rank(ranks: int) -> int:
    """Return the bytes of memory that each of the ranks of this machine may use."""
    sizes = [min([_total_memory_bytes(), *_control_group_limits()]) // ranks]
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            sizes.append(soft)
    return min(sizes)


def _total_memory_bytes() -> int:
    """Return the size of memory and swap."""
    with open("/proc/meminfo", encoding="ascii") as file:
        kib: Dict[str, int] = {
            name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in file)
        }
    return (kib["MemTotal"] + kib.get("SwapTotal", 0)) * 1024


def _control_group_limits() -> Iterator[int]:
    """Yield the limits of the control groups, version 1 and 2, of this process."""
    with contextlib.suppress(OSError):
        with open(CGROUP_LIST, encoding="utf-8", errors="replace") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        for _, controllers, path in groups:
            if controllers not in ("", "memory") and "memory" not in controllers.split(","):
                continue
            root = CGROUP_ROOT + ("/memory" if controllers else "")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            parts = [part for part in path.split("/") if part]
            for length in range(len(parts) + 1):
                text = _read(os.path.join(root, *parts[:length], name))
                if text.isdecimal():
                    yield int(text)


def _read(path: str) -> str:
    """Return the content of a file without spaces around it; empty when it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
