# SPDX-License-Identifier: Apache-2.0
"""Measure the all-reduce bandwidth between the ranks (NCCL_TEST=1 ./run_and_time.sh).

    mpirun ... python -m mxresnet.bandwidth [flags of python -m mxresnet]

It exchanges as many bytes as a step of the reference network does in float16, over the path that
the gradients take: Horovod, which uses NCCL between GPUs and MPI between CPUs. It does not train.
The figures have the names of NVIDIA's nccl-tests: the algorithm bandwidth is the size divided by
the time; the bus bandwidth is what each rank sends and receives, 2 (n - 1) / n of it for n ranks.
"""

from __future__ import annotations

import os
import sys
import time
from typing import List

from mxresnet import cli, config_parser
from mxresnet.config import Config
from mxresnet.errors import ExitStatus, exit_now
from mxresnet.parallel.world import World, catch_user_error, start_horovod
from mxresnet.standard_streams import prepare_streams

SIZE_BYTES = 51_200_000
WARM_UP_EXCHANGES = 5
TIMED_EXCHANGES = 20


def measure(config: Config, world: World) -> None:
    """Time the exchanges, and write one line on rank 0.

    Raises:
        UserError: the settings do not fit the devices.
    """
    world = start_horovod(world)
    import mxnet as mx

    from mxresnet.device import check_device, choose_device

    device = world.run_on_all_ranks(lambda: choose_device(config, world))
    world.run_on_all_ranks(lambda: check_device(device))
    dtype, element_bytes = ("float16", 2) if device.device_type == "gpu" else ("float32", 4)
    array = mx.nd.ones((SIZE_BYTES // element_bytes,), ctx=device, dtype=dtype)
    array.wait_to_read()
    seconds: List[float] = []
    for _ in range(WARM_UP_EXCHANGES + TIMED_EXCHANGES):
        world.barrier()
        start = time.perf_counter()
        world.average([array], "bandwidth", groups=0)
        array.wait_to_read()
        seconds.append(time.perf_counter() - start)
    timed = sum(seconds[WARM_UP_EXCHANGES:]) / TIMED_EXCHANGES
    times = world.gather(timed)
    if world.rank == 0:
        sys.stderr.write(describe(world.size, f"{device.device_type}, {dtype}", max(times)) + "\n")
    world.shutdown()


def describe(num_ranks: int, kind: str, seconds: float) -> str:
    """Return the result as one line.

    Args:
        num_ranks: ranks that took part.
        kind: device and data type.
        seconds: mean time of an exchange on the slowest rank.
    """
    if num_ranks == 1:
        return "all-reduce bandwidth: not measured, because there is only one rank"
    algorithm = SIZE_BYTES / seconds / 1e9
    bus = algorithm * 2 * (num_ranks - 1) / num_ranks
    return (
        f"all-reduce of {SIZE_BYTES / 1e6:g} MB between {num_ranks} ranks ({kind}): "
        f"{seconds * 1e3:.2f} ms, algorithm bandwidth {algorithm:.2f} GB/s, "
        f"bus bandwidth {bus:.2f} GB/s"
    )


def main() -> ExitStatus:
    """Run one rank and return its exit status."""
    parsed, error = catch_user_error(lambda: config_parser.parse(sys.argv[1:], os.environ))
    config = parsed[0] if parsed else Config()
    return cli.run_rank(config, error, cli.join_or_exit(config, error), work=measure)


if __name__ == "__main__":
    prepare_streams()
    exit_now(main())
