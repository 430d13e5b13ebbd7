# SPDX-License-Identifier: Apache-2.0
"""Compare a training step on a CPU with PyTorch's and with the time of its convolutions alone.

    python benchmarks/step.py [--dtype bfloat16] [--rounds 20] [--with torch compiled]

Each contender is a process. The contenders take one step each in turn, so that other load on the
machine affects all of them.

bare      MXNet's Module with this project's network and optimizer, in the environment of
          config_CPU_common.sh
torch     PyTorch's ResNet-50 (channels last, bfloat16 autocast)
compiled  the same after torch.compile
logged    the same as bare, while oneDNN logs the time of each convolution

Prints the median images/s of each contender, and the speed of `bare` relative to it (median and
quartiles). From the log it prints the share of a step that the convolutions take, and the limit:
the speed if a step consisted of the convolutions alone, each in the shortest time that was logged
for it. `torch` and `compiled` need PyTorch.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make_trainer(batch, size, dtype):
    """Return this project's Trainer, after its warm-up, and a batch of random images."""
    import mxnet as mx
    import numpy as np

    from mxresnet.config import Config
    from mxresnet.data.loader import Batch
    from mxresnet.model.select_ops import select_ops
    from mxresnet.parallel.world import World
    from mxresnet.run_plan import make_plan
    from mxresnet.trainer import Trainer

    config = Config(
        dtype=dtype,
        image_shape=(4, size, size),
        resize=size,
        batch_size=batch,
        optimizer="sgdwfastlars",
        lr_step_epochs="pow2",
        num_epochs=9,
        warmup_epochs=1,
        fuse_bn_relu=1,
        label_smoothing=0.1,
    )
    plan = make_plan(config, 1000 * batch, 1)
    ops = select_ops(config, on_gpu=False)
    trainer = Trainer(config, plan, World(), 1000, mx.cpu(), ops)
    trainer.initialize()
    trainer.warm_up()
    random = np.random.RandomState(0)
    data = Batch(
        mx.nd.array(random.randn(*config.batch_shape)),
        mx.nd.array(random.randint(0, 1000, batch)),
        batch,
    )
    return trainer, data


def mxnet_stepper(batch, size, dtype):
    """Return a function that takes one training step of this project's Trainer."""
    trainer, data = make_trainer(batch, size, dtype)

    def step():
        trainer.forward(data)
        trainer.backward()
        trainer.update()
        trainer.bad_gradient(max_pending=2)
        trainer.wait()

    return step


def torch_resnet50():
    """Return ResNet-50 v1.5 in PyTorch."""
    import torch

    norm = torch.nn.BatchNorm2d

    def conv(in_channels, filters, kernel, stride):
        return torch.nn.Conv2d(in_channels, filters, kernel, stride, kernel // 2, bias=False)

    def unit(in_channels, filters, stride, project):
        body = torch.nn.Sequential(
            conv(in_channels, filters, 1, 1),
            norm(filters),
            torch.nn.ReLU(inplace=True),
            conv(filters, filters, 3, stride),
            norm(filters),
            torch.nn.ReLU(inplace=True),
            conv(filters, 4 * filters, 1, 1),
            norm(4 * filters),
        )
        body.shortcut = (
            torch.nn.Sequential(conv(in_channels, 4 * filters, 1, stride), norm(4 * filters))
            if project
            else torch.nn.Identity()
        )
        return Residual(body)

    class Residual(torch.nn.Module):
        def __init__(self, body):
            super().__init__()
            self.shortcut = body.shortcut
            del body.shortcut
            self.body = body

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    layers = [
        torch.nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for stage, (units, filters) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512))):
        for number in range(units):
            layers.append(unit(channels, filters, 2 if stage and not number else 1, not number))
            channels = 4 * filters
    return torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, 1000)
    )


def torch_stepper(batch, size, dtype, compiled=False):
    """Return a function that takes one training step in PyTorch."""
    import torch

    net = torch_resnet50().to(memory_format=torch.channels_last)
    net = torch.compile(net) if compiled else net
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


def compiled_stepper(batch, size, dtype):
    """Return a function that takes one training step in PyTorch with torch.compile."""
    return torch_stepper(batch, size, dtype, compiled=True)


STEPPERS = {"bare": mxnet_stepper, "torch": torch_stepper, "compiled": compiled_stepper}


def work(kind, batch, size, dtype):
    """Run one contender in this process, after a first step that is not measured."""
    step = STEPPERS[kind](batch, size, dtype)
    step()
    serve(step)


def serve(turn, first=lambda: None):
    """Run a turn and print its seconds for each line on standard input, which take_turns() writes.

    Args:
        turn: Function to time.
        first: Function to run before each turn; it is not timed.
    """
    print("ready", flush=True)
    for _ in sys.stdin:
        first()
        start = time.perf_counter()
        turn()
        print("seconds", time.perf_counter() - start, flush=True)


def environment(kind, threads):
    """Return the environment variables of libraries that config_CPU_common.sh sets.

    PyTorch gets the variables of malloc too. They keep freed memory in the process; without them
    PyTorch is slower, because it touches new pages in each step.
    """
    command = (
        f"export DGXNGPU=1 OMP_NUM_THREADS={threads}; source {ROOT}/config_CPU_common.sh; env -0"
    )
    exported = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split("\0")
    libraries = ("MALLOC_", "OMP_") + (("MXNET_", "OMPI_") if kind == "bare" else ())
    return {
        key: value
        for key, _, value in (line.partition("=") for line in exported)
        if key.startswith(libraries)
    }


def start_contender(kind, options, **environ):
    """Start the process of a contender, with additional environment variables."""
    command = [
        sys.executable,
        __file__,
        "--work",
        kind,
        "--batch",
        str(options.batch),
        "--size",
        str(options.size),
        "--dtype",
        options.dtype,
    ]
    path = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment(kind, options.threads), **environ}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def wait_for_line(process, word, seen=None):
    """Return the fields of the next line that starts with a word; append earlier lines to seen."""
    for line in process.stdout:
        if line.startswith(word):
            return line.split()
        if seen is not None:
            seen.append(line)
    raise SystemExit("a contender ended; its output is above")


def convolution_times(lines):
    """Return (description, seconds) of each convolution in oneDNN's log of a step."""
    rows = [
        line.rstrip().split(",")
        for line in lines
        if re.match(r"(dnnl|onednn|mkldnn)_verbose,exec,cpu,convolution", line)
    ]
    return sorted((",".join(row[:-1]), float(row[-1]) / 1000) for row in rows)


def take_turns(processes, rounds):
    """Return the seconds of each contender's steps, and the convolutions of the last contender.

    The latter is one list of (description, seconds) for each round.
    """
    seconds, logs = {kind: [] for kind in processes}, []
    for _ in range(rounds):
        for kind, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            seen = []
            seconds[kind].append(float(wait_for_line(process, "seconds", seen)[1]))
        logs.append(convolution_times(seen))
    return seconds, logs


def format_quartiles(values):
    """Return the median and the quartiles as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} (quartiles {low:.3f}-{high:.3f})"


def peak_bytes(process):
    """Return the largest resident memory that a process has had so far."""
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def report(seconds, logs, batch):
    """Print the results of take_turns()."""
    logged, bare = seconds.pop("logged"), seconds["bare"]
    for kind, values in seconds.items():
        ratios = [other / own for other, own in zip(values, bare)]
        speed = batch / statistics.median(values)
        print(f"{kind:9} {speed:6.1f} images/s; bare is {format_quartiles(ratios)} times as fast")
    convolutions = [sum(time for _, time in log) for log in logs]
    share_of_logged = format_quartiles([part / step for part, step in zip(convolutions, logged)])
    logged_to_bare = format_quartiles([step / other for step, other in zip(logged, bare)])
    share_of_bare = format_quartiles([part / step for part, step in zip(convolutions, bare)])
    print(
        f"convolutions take {share_of_logged} of the step that logs them (which takes "
        f"{logged_to_bare} of bare's time), {share_of_bare} of bare's step"
    )
    limit = sum(min(times) for times in zip(*[[time for _, time in log] for log in logs]))
    print(
        f"limit     {batch / limit:6.1f} images/s for {len(logs[0])} convolutions alone, each at "
        f"its fastest: bare reaches {limit / statistics.median(bare):.3f} of it, "
        f"{limit / min(bare):.3f} in its fastest step"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", choices=STEPPERS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--with", dest="others", nargs="*", default=[], choices=["torch", "compiled"]
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.batch, options.size, options.dtype)
        return
    processes = {kind: start_contender(kind, options) for kind in ["bare", *options.others]}
    processes["logged"] = start_contender("bare", options, DNNL_VERBOSE="1", MKLDNN_VERBOSE="1")
    for process in processes.values():
        wait_for_line(process, "ready")
    seconds, logs = take_turns(processes, options.rounds)
    memory = peak_bytes(processes["bare"])
    for process in processes.values():
        process.kill()
    print(
        f"{options.dtype}, batch {options.batch} x {options.size} x {options.size}, "
        f"{options.threads} threads, {options.rounds} rounds"
    )
    report(seconds, logs, options.batch)
    print(f"bare's memory: {memory / 2**30:.2f} GiB at most")


if __name__ == "__main__":
    main()
