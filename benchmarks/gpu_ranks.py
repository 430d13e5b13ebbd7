# SPDX-License-Identifier: Apache-2.0
"""Check that ranks exchange gradients exactly and keep the same weights.

    python benchmarks/gpu_ranks.py [--ranks 2] [--device cpu] [--steps 5]

Each rank is one GPU. First the ranks average arrays that hold different whole numbers, so that the
result is exact, in float16 and float32, alone and as one group, with the function that averages
gradients. Then they train with different images (training_problem.py), and all weights and momenta
must remain the same, bit by bit, on all ranks.

Exit status: 0 right, 1 wrong, 2 it cannot run here.
"""

import argparse
import hashlib
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_training  # noqa: E402
import training_problem as problem  # noqa: E402
from local_ranks import mpirun_command, mpirun_environment  # noqa: E402

from mxresnet import cli  # noqa: E402
from mxresnet.config import Config  # noqa: E402
from mxresnet.data.loader import load_backend  # noqa: E402
from mxresnet.errors import ExitStatus, UserError, exit_now  # noqa: E402
from mxresnet.parallel.world import start_horovod  # noqa: E402

SIZES = (1, 7, 1000, 300_001)  # elements of the arrays
VARIANTS = {"gpu": "float16-nhwc-own", "cpu": "float32-nchw-public"}


def wrong_averages(world, device, dtypes):
    """Return what is wrong with averages over the ranks; an empty list if nothing is.

    Args:
        world: The ranks, with Horovod.
        device: MXNet context.
        dtypes: Types of the arrays.
    """
    import mxnet as mx

    wrong = []
    for groups in (0, 1):
        arrays = [
            mx.nd.full((size,), 2 * world.rank + number, ctx=device, dtype=dtype)
            for dtype in dtypes
            for number, size in enumerate(SIZES)
        ]
        world.average(arrays, f"check{groups}", groups)
        for number, array in enumerate(arrays):
            expected = world.size - 1 + number % len(SIZES)
            found = array.asnumpy()
            if not (found == expected).all():
                wrong.append(
                    f"average of {len(found)} x {found.dtype}, groups {groups}: {found.min()} to "
                    f"{found.max()}, not {expected}"
                )
    return wrong


def fingerprint(trainer):
    """Return a hash of all weights and momenta."""
    digest = hashlib.sha256()
    parameters, _ = trainer._module.get_params()
    for name in sorted(parameters):
        digest.update(parameters[name].asnumpy().tobytes())
    states = trainer._module._updater.states
    for index in sorted(states):
        for array in states[index]:
            if array is not None:
                digest.update(array.asnumpy().tobytes())
    return digest.hexdigest()


def train(world, device, variant, steps):
    """Train with other images on each rank; return the fingerprint of the result."""
    with gpu_training.narrow_network():
        trainer = gpu_training.start_training(variant, device, world)
        batches = gpu_training.make_batches(trainer._config, device)
        for step in range(steps):
            trainer.forward(batches[(step * world.size + world.rank) % problem.STEPS_PER_EPOCH])
            trainer.backward()
            trainer.update()
        trainer.wait()
        return fingerprint(trainer)


def check(options, world):
    """Run the checks on this rank; return whether all ranks are right.

    Raises:
        UserError: The ranks are too few, or on other devices.
    """
    if world.size != options.ranks:
        raise UserError(f"mpirun has started {options.ranks} ranks, and {world.size} are connected")
    world = start_horovod(world)
    import mxnet as mx

    from mxresnet.device import check_device, choose_device

    name = VARIANTS[options.device]
    variant = gpu_training.VARIANTS[name]
    config = gpu_training.make_config(variant)
    device = world.run_on_all_ranks(lambda: choose_device(config, world))
    if device.device_type != options.device:
        raise UserError(f"the ranks run on the {device.device_type}: see --device")
    world.run_on_all_ranks(lambda: check_device(device))
    dtypes = ("float32", "float16") if options.device == "gpu" else ("float32",)
    problems = wrong_averages(world, device, dtypes)
    prints = world.gather(train(world, device, variant, options.steps))
    problems += ["the weights differ between ranks"] * (len(set(prints)) > 1)
    for text in problems:
        print(f"rank {world.rank}: {text}", flush=True)
    right = not any(world.sum([len(problems)]))
    if world.rank == 0:
        print(
            f"{world.size} ranks ({options.device}, {name}): averages and weights after "
            f"{options.steps} steps are {'right' if right else 'WRONG'}",
            flush=True,
        )
    mx.nd.waitall()
    world.shutdown()
    return right


def main():
    """Start the ranks, or run one of them; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.as_rank:
        try:
            command = mpirun_command(options.ranks, os.environ, *sys.argv, "--as-rank")
        except UserError as error:
            print(f"gpu_ranks.py: {error}", file=sys.stderr)
            return ExitStatus.USER_ERROR
        os.execve(command[0], command, mpirun_environment(os.environ))
    gpu_training.set_environment(os.environ)
    load_backend(Config())  # DALI must be loaded before Horovod
    config = Config()
    status = cli.run_rank(
        config, None, cli.join_or_exit(config, None), work=lambda _, world: check(options, world)
    )
    return 1 if status is ExitStatus.TARGET_MISSED else status


if __name__ == "__main__":
    exit_now(main())
