# SPDX-License-Identifier: Apache-2.0
"""A training step on CPU against its peers: python benchmarks/step.py [--dtype bfloat16] [--rounds 20] [--with torch]

Contenders are live processes that step in turn, so that a noisy neighbour meets all of them: `bare` is MXNet's Module with
this project's network and optimizer, `convolutions` the time that oneDNN's convolutions alone take in it (the least of
several steps for each primitive, from its own log), `torch` PyTorch's ResNet-50 as this project's tests build it (channels
last, bfloat16 autocast, where PyTorch is installed). Prints median images/s, the spread, and each ratio to `bare`.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# malloc kept off mmap: fresh pages cost both sides several percent, PyTorch most.
QUIET_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def mxnet_stepper(batch, size, dtype):
    import mxnet as mx
    import numpy as np

    from mxresnet.config import Config
    from mxresnet.distributed import World
    from mxresnet.pipeline import Batch
    from mxresnet.schedule import make_plan
    from mxresnet.trainer import Trainer

    config = Config(
        dtype=dtype, image_shape=(4, size, size), resize=size, batch_size=batch, optimizer="sgdwfastlars", lr_step_epochs="pow2",
        num_epochs=9, warmup_epochs=1, fuse_bn_relu=1, label_smoothing=0.1)
    trainer = Trainer(config, make_plan(config, 1000 * batch, 1), World(), 1000, mx.cpu())
    trainer.initialise()
    trainer.warm_up()
    random = np.random.RandomState(0)
    data = Batch(mx.nd.array(random.randn(*config.batch_shape)), mx.nd.array(random.randint(0, 1000, batch)), batch)

    def step():
        trainer.forward(data)
        trainer.backward()
        trainer.update()
        trainer.wait()

    return step


def torch_stepper(batch, size, dtype):
    import torch

    def unit(inside, filters, stride, project):
        norm = torch.nn.BatchNorm2d
        conv = lambda i, o, k, s: torch.nn.Conv2d(i, o, k, s, k // 2, bias=False)  # noqa: E731
        body = torch.nn.Sequential(
            conv(inside, filters, 1, 1), norm(filters), torch.nn.ReLU(inplace=True), conv(filters, filters, 3, stride), norm(filters),
            torch.nn.ReLU(inplace=True), conv(filters, 4 * filters, 1, 1), norm(4 * filters))
        body.shortcut = torch.nn.Sequential(conv(inside, 4 * filters, 1, stride), norm(4 * filters)) if project else torch.nn.Identity()
        return Residual(body)

    class Residual(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.shortcut = body.shortcut
            del body.shortcut
            self.body = body

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    layers = [torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(64), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(3, 2, 1)]
    inside = 64
    for stage, (units, filters) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for number in range(units):
            layers.append(unit(inside, filters, 2 if stage and not number else 1, not number))
            inside = 4 * filters
    net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(inside, 1000))
    net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = net(images)
        torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        optimizer.step()

    return step


STEPPERS = {"bare": mxnet_stepper, "torch": torch_stepper}


def work(kind, batch, size, dtype):
    """A contender's process: one step for each line that comes in, its seconds out."""
    step = STEPPERS[kind](batch, size, dtype)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print("seconds", time.perf_counter() - start, flush=True)


def contender(kind, options, **environ):
    command = [sys.executable, __file__, "--work", kind, "--batch", str(options.batch), "--size", str(options.size), "--dtype", options.dtype]
    env = {**os.environ, **QUIET_MALLOC, "OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]), **environ}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def answer(process, word, seen=None):
    for line in process.stdout:
        if line.startswith(word):
            return line.split()
        if seen is not None:
            seen.append(line)
    raise SystemExit("a contender ended; what it said is above")


def convolution_seconds(options, steps=6):
    """oneDNN's own account of its convolutions in one step: for each the least of several steps, added up."""
    process = contender("bare", options, DNNL_VERBOSE="1", MKLDNN_VERBOSE="1")
    answer(process, "ready")
    runs = []
    for _ in range(steps):
        process.stdin.write("\n")
        process.stdin.flush()
        seen = []
        answer(process, "seconds", seen)
        rows = [line.rstrip().split(",") for line in seen if re.match(r"(dnnl|onednn|mkldnn)_verbose,exec,cpu,convolution", line)]
        runs.append([(",".join(row[:-1]), float(row[-1])) for row in rows])
    process.kill()
    least = [min(times) for times in zip(*[[ms for _, ms in sorted(run, key=lambda row: row[0])] for run in runs])]
    return sum(least) / 1000, len(least)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=STEPPERS, help=argparse.SUPPRESS)
    parser.add_argument("--with", dest="others", nargs="*", default=[], choices=["torch"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.batch, options.size, options.dtype)
    kinds = ["bare", *options.others]
    processes = {kind: contender(kind, options) for kind in kinds}
    for process in processes.values():
        answer(process, "ready")
    seconds = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seconds[kind].append(float(answer(process, "seconds")[1]))
    for process in processes.values():
        process.kill()
    bare = statistics.median(seconds["bare"])
    print(f"{options.dtype}, batch {options.batch} x {options.size} x {options.size}, {options.threads} threads, {options.rounds} rounds")
    for kind, values in seconds.items():
        low, high = statistics.quantiles(values, n=4)[0], statistics.quantiles(values, n=4)[2]
        ratios = sorted(other / own for other, own in zip(values, seconds["bare"]))
        print(f"{kind:14}{options.batch / statistics.median(values):7.1f} images/s (quartiles {options.batch / high:.1f}-{options.batch / low:.1f}), "
              f"bare is {statistics.median(ratios):.2f} times as fast (quartiles {ratios[len(ratios) // 4]:.2f}-{ratios[3 * len(ratios) // 4]:.2f})")
    limit, count = convolution_seconds(options)
    print(f"convolutions  {options.batch / limit:7.1f} images/s were there nothing else ({count} primitives): bare reaches {limit / bare:.2f} of it, "
          f"{limit / min(seconds['bare']):.2f} in its best step")


if __name__ == "__main__":
    main()
