# SPDX-License-Identifier: Apache-2.0
"""Measure training at ResNet-50's size, and compare with published results and between ranks.

    python benchmarks/gpu_speed.py [--ranks 1 2] [--system NAME] [--steps 20] [-- FLAGS]

Runs python -m mxresnet on random images, with the settings of the configuration for GPU 0, for two
epochs of --steps steps; the second one is measured. Prints images/s, and

- with 1 rank, the share of the published speed of one such GPU: the mean of the results of one
  machine (mxresnet/results/published), which include reading the images;
- with several numbers of ranks, the speed relative to that many times the speed of the first.

Exit status: 0 measured, 1 a run failed or is below MIN_SHARE or MIN_SCALING, which only something
broken explains, 2 it cannot run here.
"""

import argparse
import fnmatch
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import gpu_query  # noqa: E402
from local_ranks import mpirun_command, mpirun_environment  # noqa: E402

from mxresnet.errors import UserError  # noqa: E402
from mxresnet.launch import hardware, system_config  # noqa: E402
from mxresnet.results import published_round  # noqa: E402

MIN_SHARE, MIN_SCALING = 0.25, 0.75
ROUND = f"MLPerf Training {published_round.ROUND}"
# For a GPU that no configuration names: memory in GiB, and the configuration with a batch for it.
BY_MEMORY = ((80, "DGXA100"), (40, "A100-40GB_4gpu"), (24, "A30_1x2x204"), (0, "T4_4gpu"))


def choose_system(gpu):
    """Return the configuration whose batch is for such a GPU, whatever their number is."""
    for known in hardware.GPU_SYSTEMS:
        if gpu.memory_gib == known.memory_gib and fnmatch.fnmatchcase(gpu.name, known.name_pattern):
            return known.system
    return next(system for memory, system in BY_MEMORY if gpu.memory_gib >= memory)


def published_speed(name):
    """Return (mean images/s of one GPU in published results, their number), or None.

    Args:
        name: Name of the GPU, as nvidia-smi writes it.
    """
    kind = published_round.parse_kind(name)
    speeds = [
        system.images_per_second_each
        for system in published_round.published_systems()
        if kind and system.nodes == 1 and system.kind and system.kind.matches(kind)
    ]
    speeds = [speed for speed in speeds if speed]
    return (statistics.mean(speeds), len(speeds)) if speeds else None


def measure(ranks, system, steps, flags):
    """Return images/s of a run with random images, in its second epoch.

    Args:
        ranks: Number of ranks on this machine.
        system: Name of the configuration.
        steps: Steps of an epoch.
        flags: Further flags of mxresnet.

    Raises:
        UserError: The run fails.
    """
    environ = system_config.load_configuration(system, os.environ)
    batch = int(environ["BATCHSIZE"])
    if "--batch-size" in flags:
        batch = int(flags[flags.index("--batch-size") + 1])
    command = mpirun_command(
        ranks,
        environ,
        *("-m", "mxresnet", "--synth-data", 1, "--disp-batches", 0),
        *("--num-examples", ranks * batch * steps, "--num-epochs", 2, "--warmup-epochs", 1),
        *flags,
    )
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=mpirun_environment(environ),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print("\n".join(line for line in done.stdout.splitlines() if not line.startswith(":::MLLOG")))
    speeds = re.findall(r'"imgs_sec": ([\d.]+)', done.stdout)
    if done.returncode or len(speeds) != 2:
        raise UserError(f"the run with {ranks} ranks failed with status {done.returncode}")
    return float(speeds[-1])


def report(name, speeds):
    """Print the comparisons of measured speeds; return whether they are plausible.

    Args:
        name: Name of the GPU.
        speeds: images/s by number of ranks.
    """
    plausible = True
    (first, speed), *others = speeds.items()
    lines = [f"{speed:.0f} images/s with {first} x {name}"]
    published = published_speed(name)
    if published:
        mean, count = published
        share = speed / first / mean
        lines.append(
            f"{share:.2f} of the published {mean:.0f} for each GPU (mean of {count} results of "
            f"{ROUND})"
        )
        plausible = share >= MIN_SHARE
    else:
        lines.append(f"no result of {ROUND} is for such a GPU")
    for ranks, other in others:
        scaling = other / ranks / (speed / first)
        lines.append(f"{other:.0f} with {ranks}: {scaling:.2f} of {ranks} times one")
        plausible = plausible and scaling >= MIN_SCALING
    print("; ".join(lines), flush=True)
    return plausible


def main():
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--system", help="configuration; default: the one for GPU 0")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="further flags of mxresnet")
    options = parser.parse_args()
    try:
        if options.system:
            name, system = options.system, options.system
        else:
            gpu = gpu_query.query_gpus(os.environ)[0]
            name, system = gpu.name, choose_system(gpu)
        speeds = {n: measure(n, system, options.steps, options.flags) for n in options.ranks}
    except UserError as error:
        print(f"gpu_speed.py: {error}", file=sys.stderr)
        return 2 if "failed with status" not in str(error) else 1
    return 0 if report(name, speeds) else 1


if __name__ == "__main__":
    sys.exit(main())
