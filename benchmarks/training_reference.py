# SPDX-License-Identifier: Apache-2.0
"""Train the problem of training_problem.py with PyTorch, and write the losses of each step.

    python benchmarks/training_reference.py [--steps 100]

The network, LARS and the schedule are written here once more, from their sources; nothing of
mxresnet is used. training_losses.json gets

losses     the losses of float64
deviations for each precision, the largest difference from them up to each step, when what an
           implementation stores in this precision is rounded to it: weights, outputs of layers, and
           their gradients. float16 and bfloat16 are rounded in several ways, because a correct
           implementation may add in another order.

It needs PyTorch and numpy, and takes some minutes on a CPU.
"""

import argparse
import json

import numpy as np
import torch
from training_problem import (
    BATCH,
    CLASSES,
    LOSSES_FILE,
    SETTINGS,
    STAGE_FILTERS,
    STEM_FILTERS,
    STEPS,
    STEPS_PER_EPOCH,
    images_and_labels,
    initial_weights,
    smoothed_targets,
)

functional = torch.nn.functional
UNITS = (3, 4, 6, 3)
ETA, EPSILON, MOMENTUM, END_RATE = 0.001, 1e-5, 0.9, 1e-4
# Roundings of the same precision: the value before rounding is multiplied by one of these, which
# moves the points at which it is rounded up or down.
SHIFTS = (1.0, 1.37, 0.77)


class Rounded(torch.autograd.Function):
    """Round a value in the forward pass, and its gradient in the backward pass."""

    @staticmethod
    def forward(ctx, x, dtype, shift):
        ctx.dtype, ctx.shift = dtype, shift
        return (x * shift).to(dtype).to(x.dtype) / shift

    @staticmethod
    def backward(ctx, gradient):
        rounded = (gradient * ctx.shift).to(ctx.dtype).to(gradient.dtype) / ctx.shift
        return rounded, None, None


def layers():
    """Yield (convolution, batch norm, input channels, filters, kernel)."""
    yield "conv0", "bn0", 4, STEM_FILTERS, 7
    channels = STEM_FILTERS
    for stage, (units, filters) in enumerate(zip(UNITS, STAGE_FILTERS), start=1):
        for unit in range(1, units + 1):
            name = f"stage{stage}_unit{unit}_"
            yield f"{name}conv1", f"{name}bn1", channels, filters, 1
            yield f"{name}conv2", f"{name}bn2", filters, filters, 3
            yield f"{name}conv3", f"{name}bn3", filters, 4 * filters, 1
            if unit == 1:
                yield f"{name}conv1sc", f"{name}bnsc", channels, 4 * filters, 1
            channels = 4 * filters


def parameter_shapes():
    """Return the shape of each parameter by name."""
    shapes = {"fc1_weight": (CLASSES, 4 * STAGE_FILTERS[-1]), "fc1_bias": (CLASSES,)}
    for conv, bn, channels, filters, kernel in layers():
        shapes[f"{conv}_weight"] = (filters, channels, kernel, kernel)
        shapes[f"{bn}_gamma"] = shapes[f"{bn}_beta"] = (filters,)
    return shapes


def logits(parameters, x, rounded):
    """Return the network's output before the softmax.

    Args:
        parameters: Tensors by name.
        x: Images.
        rounded: Function that rounds what is stored.
    """

    def conv_bn(x, conv, bn, stride=1, pad=0):
        weight = rounded(parameters[f"{conv}_weight"])
        x = rounded(functional.conv2d(x, weight, stride=stride, padding=pad))
        gamma, beta = parameters[f"{bn}_gamma"], parameters[f"{bn}_beta"]
        x = functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPSILON)
        return rounded(x)

    x = functional.max_pool2d(conv_bn(x, "conv0", "bn0", 2, 3).relu(), 3, 2, 1)
    for stage, units in enumerate(UNITS, start=1):
        for unit in range(1, units + 1):
            name = f"stage{stage}_unit{unit}_"
            stride = 2 if stage > 1 and unit == 1 else 1
            y = conv_bn(x, f"{name}conv1", f"{name}bn1").relu()
            y = conv_bn(y, f"{name}conv2", f"{name}bn2", stride, 1).relu()
            y = conv_bn(y, f"{name}conv3", f"{name}bn3")
            if unit == 1:
                x = conv_bn(x, f"{name}conv1sc", f"{name}bnsc", stride)
            x = rounded(y + x).relu()
    x = rounded(x.mean((2, 3)))
    return rounded(
        functional.linear(x, rounded(parameters["fc1_weight"]), rounded(parameters["fc1_bias"]))
    )


def learning_rate(update):
    """Return the rate of an update: a linear warm-up, then a polynomial decay of power 2."""
    warm_up = SETTINGS["warmup_epochs"] * STEPS_PER_EPOCH
    if update <= warm_up:
        return SETTINGS["lr"] * update / warm_up
    remaining = 1 - (update - warm_up) / (SETTINGS["num_epochs"] * STEPS_PER_EPOCH - warm_up)
    return END_RATE + (SETTINGS["lr"] - END_RATE) * remaining**2


def lars_step(parameters, momenta, update):
    """Update the parameters in place (You et al., arXiv:1708.03888, with momentum correction)."""
    rate, previous_rate = learning_rate(update), learning_rate(update - 1)
    for name, weight in parameters.items():
        gradient, decay = weight.grad / BATCH, SETTINGS["wd"]
        trust = correction = 1.0
        if name.endswith("_weight"):
            norm, gradient_norm = weight.norm(), gradient.norm()
            trust = ETA * norm / (gradient_norm + decay * norm)
            correction = rate / previous_rate
        elif not name.endswith("_bias"):
            decay = 0.0
        change = trust * rate * (gradient + decay * weight)
        momenta[name] = MOMENTUM * correction * momenta[name] - change
        weight += momenta[name]
        weight.grad = None


def train(steps, dtype, rounded):
    """Return the loss of each step.

    Args:
        steps: Number of steps.
        dtype: Type of all arithmetic.
        rounded: Function that rounds what is stored.
    """
    images, labels = images_and_labels()
    parameters = {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in initial_weights(parameter_shapes()).items()
    }
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}
    losses = []
    for step in range(steps):
        batch = step % STEPS_PER_EPOCH
        x = torch.tensor(images[batch], dtype=dtype)
        target = torch.tensor(smoothed_targets(labels[batch]), dtype=dtype)
        # The sum: its gradients are 16 times those of the mean and do not underflow in float16.
        loss = -(target * logits(parameters, x, rounded).log_softmax(1)).sum()
        loss.backward()
        with torch.no_grad():
            # The first update belongs to the warm-up before the clock, and is undone.
            lars_step(parameters, momenta, update=step + 2)
        losses.append(loss.item() / BATCH)
        if step % 10 == 9:
            print(step + 1, losses[-1], flush=True)
    return losses


def rounding(dtype, shift):
    """Return a function that rounds tensors to a type."""
    return lambda x: Rounded.apply(x, dtype, shift)


def deviations(losses, expected):
    """Return the largest difference from the expected losses up to each step."""
    return np.maximum.accumulate(np.abs(np.array(losses) - np.array(expected))).tolist()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    expected = train(options.steps, torch.float64, lambda x: x)
    found = {"float32": [train(options.steps, torch.float32, lambda x: x)]}
    for name in ("float16", "bfloat16"):
        found[name] = [
            train(options.steps, torch.float32, rounding(getattr(torch, name), shift))
            for shift in SHIFTS
        ]
    result = {
        "made_by": f"benchmarks/training_reference.py, PyTorch {torch.__version__}",
        "losses": [round(loss, 9) for loss in expected],
        "deviations": {
            name: [
                float(f"{max(values):.3g}")
                for values in zip(*[deviations(losses, expected) for losses in runs])
            ]
            for name, runs in found.items()
        },
    }
    LOSSES_FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
