# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of the training loop and of a second rank on a CPU with 2 idle cores.

    python benchmarks/scaling.py [--rounds 5] [--batch-size 32] [--image 64] [--steps 8] [--control]
    python benchmarks/scaling.py --bn-group 2 [...]

Each round runs the program on random images in the environment of config_CPU_common.sh, with 1 rank
x 1 thread, 2 ranks x 1 thread, and 1 rank x 2 threads. Then it runs the same number of bare steps
(forward, backward, update: benchmarks/step.py) with 2 threads. Prints each round, then the median
and range of these ratios of images/s:

2 ranks to twice 1 rank: the cost of exchanging gradients and of sharing the machine
2 ranks x 1 thread to 1 rank x 2 threads
whole loop to bare steps

With --control each round also has two runs of 1 rank at the same time. 2 ranks relative to these is
the cost of exchanging gradients alone, without that of sharing caches, memory and clock.

With --bn-group each round has two runs only, of 2 ranks, without and with batch norms over both.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys

import step

ROOT = pathlib.Path(__file__).resolve().parent.parent


def start(ranks, options, threads=1, bn_group=1):
    """Start a run of 2 epochs, of which the first is a warm-up; return the process."""
    mpirun = pathlib.Path(sys.executable).parent / "mpirun"
    command = [
        mpirun,
        "-np",
        ranks,
        "--oversubscribe",
        "--bind-to",
        "none",
        sys.executable,
        "-m",
        "mxresnet",
        "--synth-data",
        1,
        "--num-classes",
        1000,
        "--num-examples",
        options.steps * options.batch_size * ranks,
        "--image-shape",
        f"4,{options.image},{options.image}",
        "--resize",
        options.image,
        "--batch-size",
        options.batch_size,
        "--num-epochs",
        2,
        "--dtype",
        options.dtype,
        "--fuse-bn-relu",
        1,
        "--bn-group",
        bn_group,
        "--warmup-epochs",
        1,
        "--optimizer",
        "sgdwfastlars",
        "--lr-step-epochs",
        "pow2",
        "--disp-batches",
        0,
    ]
    environ = {
        **os.environ,
        **step.environment("bare", threads),
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def bare_images_per_second(options):
    """Return the speed of options.steps bare steps, after options.steps steps of warm-up."""
    process = step.start_contender(
        "bare",
        argparse.Namespace(
            batch=options.batch_size, size=options.image, dtype=options.dtype, threads=2
        ),
    )
    step.wait_for_line(process, "ready")
    seconds = step.take_turns({"bare": process}, 2 * options.steps)[0]["bare"][options.steps :]
    process.kill()
    return options.batch_size * options.steps / sum(seconds)


def images_per_second(process):
    """Wait for a run and return the speed of its last epoch."""
    text = process.communicate()[0]
    rates = re.findall(r"of at most 2: ([\d,]+) images/s", text)
    times = re.findall(r'"imgs_sec": ([\d.]+)', text)
    if len(rates) != 2 or len(times) != 2:
        raise SystemExit(f"the run failed:\n{text[-3000:]}")
    return float(times[-1])


def compare_bn_group(options):
    """Print the speed of 2 ranks with batch norms over both, relative to that without."""
    ratios = []
    for number in range(1, options.rounds + 1):
        without = images_per_second(start(2, options))
        grouped = images_per_second(start(2, options, bn_group=options.bn_group))
        ratios.append(grouped / without)
        print(f"round {number}: images/s: {without:.1f}, --bn-group {grouped:.1f}", flush=True)
    print(
        f"--bn-group {options.bn_group} to 1: median {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f}-{max(ratios):.3f})"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rounds", 5), ("batch-size", 32), ("image", 64), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--bn-group", type=int, default=1, choices=[1, 2])
    options = parser.parse_args()
    if options.bn_group > 1:
        compare_bn_group(options)
        return
    ratios_by_name = {}
    for number in range(1, options.rounds + 1):
        one = images_per_second(start(1, options))
        two = images_per_second(start(2, options))
        threads = images_per_second(start(1, options, threads=2))
        steps = bare_images_per_second(options)
        ratios = {
            "2 ranks to twice 1 rank": two / one / 2,
            "2 ranks x 1 thread to 1 rank x 2": two / threads,
            "loop to bare steps": threads / steps,
        }
        if options.control:
            both = [start(1, options), start(1, options)]
            ratios["2 ranks to two runs of 1"] = two / sum(map(images_per_second, both))
        print(
            f"round {number}: images/s: 1 rank {one:.1f}, 2 ranks {two:.1f}, 2 threads "
            f"{threads:.1f}, bare {steps:.1f}; "
            + ", ".join(f"{name} {value:.3f}" for name, value in ratios.items()),
            flush=True,
        )
        for name, value in ratios.items():
            ratios_by_name.setdefault(name, []).append(value)
    for name, values in ratios_by_name.items():
        print(
            f"{name}: median {statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"
        )


if __name__ == "__main__":
    main()
