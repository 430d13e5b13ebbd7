# SPDX-License-Identifier: Apache-2.0
"""The ResNet v1.5 network: its graph, its parameter names and its initializers.

Version 1.5 ("v1b" in MXNet's names) has the stride of a bottleneck unit in its 3 x 3 convolution.
The graph is written once, over the operators of a backend (see ops.py).

Sources: He et al., "Deep Residual Learning for Image Recognition" (2015); the network
resnet-v1b-fl of NVIDIA's MLPerf Training v2.1 submission. The parameter names are those that
MLPerf's compliance checker requires.
"""

from __future__ import annotations

from typing import Any, List, Tuple

import mxnet as mx

from mxresnet.config import Config
from mxresnet.model.ops import Feature, PlainOps

UNITS_PER_STAGE = {  # number of layers: residual units in each of the four stages
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    269: (3, 30, 48, 8),
}
MIN_BOTTLENECK_LAYERS = 50  # smaller networks have basic units
STEM_FILTERS = 64
STAGE_FILTERS = (64, 128, 256, 512)  # of the 3 x 3 convolutions
BOTTLENECK_EXPANSION = 4  # output channels of a bottleneck unit per filter of its 3 x 3 convolution
FC_SIGMA = 0.01


def _unit_convolutions(num_layers: int, filters: int, stride: int) -> List[Tuple[int, int, int]]:
    """Return (filters, kernel size, stride) of each convolution of a residual unit."""
    if num_layers < MIN_BOTTLENECK_LAYERS:
        return [(filters, 3, stride), (filters, 3, 1)]
    return [(filters, 1, 1), (filters, 3, stride), (filters * BOTTLENECK_EXPANSION, 1, 1)]


def _residual_unit(
    ops: PlainOps,
    x: Feature,
    name: str,
    convolutions: List[Tuple[int, int, int]],
    stride: int,
    project: bool,
) -> Feature:
    """Return relu(convolutions(x) + shortcut).

    Args:
        ops: Operator backend.
        x: Input of the unit.
        name: Prefix of the names of the unit's layers.
        convolutions: (filters, kernel size, stride) of each convolution.
        stride: Stride of the whole unit.
        project: Whether the shortcut is a 1 x 1 convolution of x instead of x itself. The first
            unit of each stage needs this, because the number of channels changes there.
    """
    y = x
    for number, (filters, kernel, conv_stride) in enumerate(convolutions, start=1):
        y = ops.conv_bn(
            y, f"{name}_conv{number}", f"{name}_bn{number}", filters, kernel, conv_stride
        )
        if number < len(convolutions):
            y = ops.relu(y, f"{name}_relu{number}")
    shortcut = x
    if project:
        filters = convolutions[-1][0]
        shortcut = ops.conv_bn(
            x, f"{name}_conv1sc", f"{name}_bnsc", filters, kernel=1, stride=stride
        )
    return ops.add_relu(y, shortcut, f"{name}_relu{len(convolutions)}")


def build(ops: PlainOps, config: Config, num_classes: int) -> Any:
    """Return the network, with its loss, as an MXNet symbol.

    Returns:
        A symbol with the inputs data (shape config.batch_shape) and softmax_label (shape (batch,)).
        Its output is the class probabilities, float32, of shape (batch, num_classes).
    """
    x = ops.conv_bn(ops.input("data"), "conv0", "bn0", STEM_FILTERS, kernel=7, stride=2)
    x = ops.relu(x, "relu0")
    x = ops.max_pool(x, "pool0")
    stages = zip(UNITS_PER_STAGE[config.num_layers], STAGE_FILTERS)
    for stage, (units, filters) in enumerate(stages, start=1):
        for unit in range(1, units + 1):
            stride = 2 if unit == 1 and stage > 1 else 1
            convolutions = _unit_convolutions(config.num_layers, filters, stride)
            name = f"stage{stage}_unit{unit}"
            x = _residual_unit(ops, x, name, convolutions, stride, project=unit == 1)
    return ops.head(x, num_classes)


def layer_names(num_layers: int) -> List[Tuple[str, str]]:
    """Return (convolution, batch norm): the names of each such pair of layers, in network order."""
    pairs = [("conv0", "bn0")]
    convolutions = len(_unit_convolutions(num_layers, filters=1, stride=1))
    for stage, units in enumerate(UNITS_PER_STAGE[num_layers], start=1):
        for unit in range(1, units + 1):
            name = f"stage{stage}_unit{unit}_"
            pairs += [(f"{name}conv{i}", f"{name}bn{i}") for i in range(1, convolutions + 1)]
            if unit == 1:
                pairs.append((f"{name}conv1sc", f"{name}bnsc"))
    return pairs


def parameter_names(num_layers: int) -> List[str]:
    """Return the names of the trainable parameters in network order (161 for 50 layers)."""
    names = [
        name
        for conv, bn in layer_names(num_layers)
        for name in (f"{conv}_weight", f"{bn}_gamma", f"{bn}_beta")
    ]
    return [*names, "fc1_weight", "fc1_bias"]


class _ZeroGamma(mx.init.Initializer):
    """Initialize a gamma to 0.

    mx.init.Zero cannot do this: MXNet calls _init_gamma for a parameter named gamma, and the method
    of the base class sets it to 1.
    """

    def _init_gamma(self, name: str, array: Any) -> None:
        array[:] = 0


def initializer(config: Config) -> mx.init.Initializer:
    """Return the initializer of the parameters, with the reference's distributions.

    Convolution weights are drawn from N(0, 2 / fan-in) (He et al., "Delving Deep into Rectifiers",
    2015). Fan-in counts the fourth input channel, which is zero padding, as the reference does.
    fc1_weight is drawn from N(0, FC_SIGMA ** 2). Gamma is 1; beta and bias are 0. With
    --bn-gamma-init0 the gamma of the last batch norm of each unit is 0, and fc1_weight is drawn
    like a convolution weight.
    """
    he_normal = mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2)
    if config.bn_gamma_init0:
        last_bn = 2 if config.num_layers < MIN_BOTTLENECK_LAYERS else 3
        rules = {f".*bn{last_bn}_gamma$": _ZeroGamma()}
    else:
        rules = {"^fc1_weight$": mx.init.Normal(FC_SIGMA)}
    rules[".*"] = he_normal
    return mx.init.Mixed(list(rules), list(rules.values()))
