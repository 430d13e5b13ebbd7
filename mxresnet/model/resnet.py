# SPDX-License-Identifier: Apache-2.0
"""ResNet v1.5 ("v1b": the stride sits in the 3 x 3 convolution), written once over an op set; its names; its first weights.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), and NVIDIA's v2.1 network resnet-v1b-fl. The
parameter names are those that MLPerf's compliance checker demands.
"""

from __future__ import annotations

from typing import Any, List, Tuple

import mxnet as mx

from mxresnet.config import Config
from mxresnet.model.ops import Feature, PlainOps

UNITS = {  # residual units in each of the four stages
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}
STEM_FILTERS = 64
STAGE_FILTERS = (64, 128, 256, 512)  # of a unit's 3 x 3 convolutions
BOTTLENECK = 4  # a bottleneck unit ends with four times as many
FC_SIGMA = 0.01


def _layers(num_layers: int, filters: int, stride: int) -> List[Tuple[int, int, int]]:
    """(filters, kernel, stride) of a unit's convolutions: two of 3 x 3 below 50 layers, else 1 x 1, 3 x 3, 1 x 1."""
    if num_layers < 50:
        return [(filters, 3, stride), (filters, 3, 1)]
    return [(filters, 1, 1), (filters, 3, stride), (filters * BOTTLENECK, 1, 1)]


def _unit(
    ops: PlainOps,
    x: Feature,
    name: str,
    layers: List[Tuple[int, int, int]],
    stride: int,
    project: bool,
) -> Feature:
    """One residual unit: its convolutions, added to the input, which the first unit of a stage projects."""
    y = x
    for number, (filters, kernel, step) in enumerate(layers, start=1):
        y = ops.conv_bn(y, f"{name}_conv{number}", f"{name}_bn{number}", filters, kernel, step)
        if number < len(layers):
            y = ops.relu(y, f"{name}_relu{number}")
    shortcut = (
        ops.conv_bn(x, f"{name}_conv1sc", f"{name}_bnsc", layers[-1][0], kernel=1, stride=stride)
        if project
        else x
    )
    return ops.add_relu(y, shortcut, f"{name}_relu{len(layers)}")


def build(ops: PlainOps, config: Config, classes: int) -> Any:
    """The network as a symbol: arguments data (config.batch_shape) and softmax_label (batch,); output (batch, classes)."""
    x = ops.relu(
        ops.conv_bn(ops.input("data"), "conv0", "bn0", STEM_FILTERS, kernel=7, stride=2), "relu0"
    )
    x = ops.max_pool(x, "pool0")
    for stage, (units, filters) in enumerate(zip(UNITS[config.num_layers], STAGE_FILTERS), start=1):
        for unit in range(1, units + 1):
            stride = 2 if unit == 1 and stage > 1 else 1
            layers = _layers(config.num_layers, filters, stride)
            x = _unit(ops, x, f"stage{stage}_unit{unit}", layers, stride, project=unit == 1)
    return ops.head(x, classes)


def layer_names(num_layers: int) -> List[Tuple[str, str]]:
    """(convolution, batch norm) for each pair of the network, in its order."""
    pairs = [("conv0", "bn0")]
    inside = [str(number) for number in range(1, len(_layers(num_layers, 1, 1)) + 1)]
    for stage, units in enumerate(UNITS[num_layers], start=1):
        for unit in range(1, units + 1):
            name = f"stage{stage}_unit{unit}_"
            pairs += [(f"{name}conv{number}", f"{name}bn{number}") for number in inside]
            pairs += [(f"{name}conv1sc", f"{name}bnsc")] * (unit == 1)
    return pairs


def parameter_names(num_layers: int) -> List[str]:
    """The trainable parameters in the order of the network: 161 names for 50 layers."""
    names = [
        name
        for conv, bn in layer_names(num_layers)
        for name in (f"{conv}_weight", f"{bn}_gamma", f"{bn}_beta")
    ]
    return names + ["fc1_weight", "fc1_bias"]


class _LastGammaZero(mx.init.Initializer):
    """MXNet asks an initializer by the parameter's kind: mx.init.Zero would set a gamma to one."""

    def _init_gamma(self, name: str, array: Any) -> None:
        array[:] = 0


def initializer(config: Config) -> mx.init.Initializer:
    """The reference's first weights: N(0, 2 / fan-in) for convolutions, fc1 N(0, 0.01), or as a convolution when
    --bn-gamma-init0 is given; gamma 1 (with --bn-gamma-init0 the last of each unit 0), beta and bias 0.

    Fan-in counts the zero-padded fourth input channel, as the reference's does.
    """
    rules = {".*": mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2)}
    if config.bn_gamma_init0:
        last = 2 if config.num_layers < 50 else 3
        rules = {f".*bn{last}_gamma$": _LastGammaZero(), **rules}
    else:
        rules = {"^fc1_weight$": mx.init.Normal(FC_SIGMA), **rules}
    return mx.init.Mixed(list(rules), list(rules.values()))
