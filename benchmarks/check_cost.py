# SPDX-License-Identifier: Apache-2.0
"""Measure what the loss and the check of the gradients take of a training step on a CPU.

    python benchmarks/check_cost.py [--batch 32] [--size 224] [--dtype bfloat16] [--rounds 10]

A step (forward, backward, update) and the checks alone, on the same arrays, take turns in one
process, in the environment of config_CPU_common.sh. Prints the median times, and the share of the
checks in the step: median and quartiles of the rounds. The times are CPU times of the process with
--threads 1, which other programs disturb less, and else those of the clock.
"""

import argparse
import os
import statistics
import sys
import time

import step


def measure(options):
    """Take turns in this process; print the result."""
    import mxnet as mx
    import numpy as np

    from mxresnet.gradient_check import GradientCheck
    from mxresnet.metrics import LossMeter

    trainer, batch = step.make_trainer(options.batch, options.size, options.dtype)
    arrays = trainer.arrays
    check, meter = GradientCheck(arrays.parameter_names), LossMeter(label_smoothing=0.1)
    probabilities = mx.nd.softmax(mx.nd.array(np.random.RandomState(1).randn(options.batch, 1000)))

    def train():
        trainer.forward(batch)
        trainer.backward()
        trainer.update()
        trainer.bad_gradient(2)
        trainer.wait()

    def checks():
        meter.add(probabilities, arrays.labels)
        check.add(arrays.gradients, trainer.optimizer.gradient_sums)
        check.find(2)
        trainer.wait()

    clock = time.process_time if options.threads == 1 else time.perf_counter
    train()
    checks()
    seconds = {train: [], checks: []}
    for _ in range(options.rounds):
        for turn, times in seconds.items():
            start = clock()
            turn()
            times.append(clock() - start)
    shares = [part / whole for whole, part in zip(seconds[train], seconds[checks])]
    whole, part = (1000 * statistics.median(times) for times in seconds.values())
    print(
        f"{options.dtype}, batch {options.batch} x {options.size} x {options.size}, "
        f"{options.threads} threads, {options.rounds} rounds: step {whole:.0f} ms, checks "
        f"{part:.1f} ms; share {step.format_quartiles(shares)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("batch", 32), ("size", 224), ("threads", 2), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        measure(options)
        return
    path = os.pathsep.join([step.ROOT, os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, **step.environment("bare", options.threads), "PYTHONPATH": path}
    os.execve(sys.executable, [sys.executable, *sys.argv, "--work"], environ)


if __name__ == "__main__":
    main()
