# SPDX-License-Identifier: Apache-2.0
"""Time the batch norms of ResNet-50 on a GPU, against PyTorch and a copy of the same size."""

import statistics

import numpy as np
from batch_norm_library import (
    BN,
    BN_ADD_RELU,
    BN_RELU,
    EPSILON,
    MOMENTUM,
    OPERATION_NAMES,
    BatchNormLayer,
)
from batch_norm_reference import random_inputs

# (operation, height and width, channels, occurrences in ResNet-50 at 224 x 224): 53 in all.
RESNET50 = [
    (BN_RELU, 112, 64, 1),
    (BN_RELU, 56, 64, 6),
    (BN_ADD_RELU, 56, 256, 3),
    (BN, 56, 256, 1),
    (BN_RELU, 56, 128, 1),
    (BN_RELU, 28, 128, 7),
    (BN_ADD_RELU, 28, 512, 4),
    (BN, 28, 512, 1),
    (BN_RELU, 28, 256, 1),
    (BN_RELU, 14, 256, 11),
    (BN_ADD_RELU, 14, 1024, 6),
    (BN, 14, 1024, 1),
    (BN_RELU, 14, 512, 1),
    (BN_RELU, 7, 512, 5),
    (BN_ADD_RELU, 7, 2048, 3),
    (BN, 7, 2048, 1),
]
REPEATS = 5  # steps of a contender per measurement
WARM_UP_ROUNDS = 3
# GPU cycles to sleep while Python queues the work; otherwise small layers would measure Python.
SLEEP_CYCLES = 5_000_000
RANDOM_IMAGES = 4  # repeated to fill a batch: numpy takes minutes for a whole batch


def torch_step(torch, tensor_options, operation, shape):
    """Return PyTorch's (forward, backward) functions, on their own memory."""
    n, h, w, c = shape
    x, z, dy = (
        torch.randn(n, c, h, w, **tensor_options).to(memory_format=torch.channels_last)
        for _ in range(3)
    )
    gamma, beta, mean, variance = (torch.ones(c, device=tensor_options["device"]) for _ in range(4))
    inputs = [x, z, gamma, beta] if operation == BN_ADD_RELU else [x, gamma, beta]
    for tensor in inputs:
        tensor.requires_grad_()
    outputs = []

    def forward():
        y = torch.nn.functional.batch_norm(
            x, mean, variance, gamma, beta, training=True, momentum=1 - MOMENTUM, eps=EPSILON
        )
        if operation == BN_ADD_RELU:
            y = y + z
        outputs[:] = [y if operation == BN else torch.relu(y)]

    def backward():
        torch.autograd.grad(outputs[0], inputs, dy, retain_graph=True)

    return forward, backward


def measure_ms(torch, run):
    """Return the milliseconds of one call of run(), measured with CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    for _ in range(REPEATS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def time_layer(torch, library, memory, operation, shape, rounds):
    """Return the median milliseconds of each contender.

    The contenders run in turn: the copy of one tensor, forward and backward of this library and of
    PyTorch.
    """
    layer = BatchNormLayer(library, memory, operation, *shape)
    arrays = random_inputs(operation, (RANDOM_IMAGES, *shape[1:]), memory.dtype, seed=1)
    layer.set({n: np.resize(a, shape) if a.ndim == 4 else a for n, a in arrays.items()})
    torch_forward, torch_backward = torch_step(torch, memory.tensor_options, operation, shape)
    source = torch.zeros(shape, **memory.tensor_options)
    target = torch.empty_like(source)
    contenders = {
        "copy": lambda: target.copy_(source),
        "forward": layer.forward,
        "backward": layer.backward,
        "torch forward": torch_forward,
        "torch backward": torch_backward,
    }
    times = {name: [] for name in contenders}
    for round_number in range(rounds + WARM_UP_ROUNDS):
        for name, run in contenders.items():
            milliseconds = measure_ms(torch, run)
            if round_number >= WARM_UP_ROUNDS:
                times[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in times.items()}


def run_timing(torch, library, memory, batch_size, rounds):
    """Time and print each batch norm of ResNet-50, and the sum over all.

    The speed is printed as a share of the speed of a copy, for two assumptions about the memory
    traffic: each tensor is read or written once; or the inputs are read twice, which is necessary
    where they do not fit into on-chip memory.
    """
    print(
        f"batch {batch_size}, {rounds} rounds: ms forward + backward, this library and PyTorch; "
        "share of a copy's speed, tensors read once / twice"
    )
    total = dict.fromkeys(("own", "torch", "once", "twice"), 0.0)
    for operation, size, channels, occurrences in RESNET50:
        shape = (batch_size, size, size, channels)
        ms = time_layer(torch, library, memory, operation, shape, rounds)
        tensor_ms = ms["copy"] / 2  # a copy reads one tensor and writes one
        # Tensors: x, y; x, dy, dx; with an addend z and dz. Read again: x; x, dy.
        addends = 2 * (operation == BN_ADD_RELU)
        layer = {
            "own": ms["forward"] + ms["backward"],
            "torch": ms["torch forward"] + ms["torch backward"],
            "once": tensor_ms * (5 + addends),
            "twice": tensor_ms * (8 + addends),
        }
        print(
            f"{occurrences:2} x {OPERATION_NAMES[operation]:12} {size:3} x {size:3} x "
            f"{channels:4}: {ms['forward']:.3f} + {ms['backward']:.3f}, PyTorch "
            f"{ms['torch forward']:.3f} + {ms['torch backward']:.3f} "
            f"({layer['torch'] / layer['own']:.2f} x); "
            f"{layer['once'] / layer['own']:.2f} / {layer['twice'] / layer['own']:.2f}",
            flush=True,
        )
        for name, value in layer.items():
            total[name] += occurrences * value
    own = total["own"]
    print(
        f"all 53: {own:.2f} ms, PyTorch {total['torch']:.2f} ms ({total['torch'] / own:.2f} x); "
        f"{total['once'] / own:.2f} / {total['twice'] / own:.2f}"
    )
