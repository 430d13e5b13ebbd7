# SPDX-License-Identifier: Apache-2.0
"""How much of a second rank's speed is lost to the exchange of gradients.

    python benchmarks/scaling.py [--rounds 5] [--batch-size 32] [--image 64] [--num-layers 50] [--steps 8]

Runs the program itself on random images: 1 rank x 1 thread, then 2 ranks x 1 thread, again and again. Prints the ratio of
their images/s, half of which is the efficiency: its median, and the least and largest of the rounds. Wants 2 idle cores.
With "--control" each round has a third part, two runs of 1 rank at the same time: what the machine itself loses (shared
caches, memory, clock) when both cores are at work.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(ranks, options):
    """Start a run of 2 epochs; the first one warms up."""
    mpirun = pathlib.Path(sys.executable).parent / "mpirun"
    command = [
        mpirun, "-np", ranks, "--oversubscribe", "--bind-to", "none", sys.executable, "-m", "mxresnet", "--synth-data", 1, "--num-classes", 1000,
        "--num-examples", options.steps * options.batch_size * ranks, "--image-shape", f"3,{options.image},{options.image}",
        "--resize", options.image, "--batch-size", options.batch_size, "--num-layers", options.num_layers, "--num-epochs", 2,
        "--warmup-epochs", 1, "--optimizer", "sgdwfastlars", "--lr-step-epochs", "pow2", "--disp-batches", 0]
    environ = {
        **os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_plm_rsh_agent": "/bin/false", "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def speed(process):
    """Images per second of a run's last epoch."""
    text = process.communicate()[0]
    rates = re.findall(r"of at most 2: ([\d,]+) images/s", text)
    times = re.findall(r'"imgs_sec": ([\d.]+)', text)
    if len(rates) != 2 or len(times) != 2:
        raise SystemExit(f"the run failed:\n{text[-3000:]}")
    return float(times[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 5), ("batch-size", 32), ("image", 64), ("num-layers", 50), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--control", action="store_true")
    options = parser.parse_args()
    ratios, controls = [], []
    for number in range(1, options.rounds + 1):
        one, two = speed(start(1, options)), speed(start(2, options))
        ratios.append(two / one)
        text = f"round {number}: {one:.1f} and {two:.1f} images/s, ratio {two / one:.3f}"
        if options.control:
            both = [start(1, options), start(1, options)]
            alone = sum(map(speed, both))
            controls.append(two / alone)
            text += f"; two runs at once {alone:.1f}, ratio {two / alone:.3f}"
        print(text, file=sys.stderr, flush=True)
    against = f"; against two separate runs at once {statistics.median(controls):.3f} ({min(controls):.3f} to {max(controls):.3f})" if controls else ""
    print(
        f"2 ranks are {statistics.median(ratios):.3f} x 1 rank ({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds){against}; "
        f"batch {options.batch_size}, {options.image} pixels, ResNet-{options.num_layers}")


if __name__ == "__main__":
    main()
