# SPDX-License-Identifier: Apache-2.0
"""ResNet v1.5 ("v1b": the stride sits in the 3 x 3 convolution), written once over an op set; its names; its first weights.

Source: He et al., "Deep Residual Learning for Image Recognition" (2015), and NVIDIA's v2.1 network resnet-v1b-fl. The
parameter names are those that MLPerf's compliance checker demands.
"""

from __future__ import annotations

from typing import Any, List

import mxnet as mx

from mxresnet.config import Config
from mxresnet.ops import Feature, PlainOps

UNITS = {50: (3, 4, 6, 3)}  # bottleneck units in each of the four stages
STEM_FILTERS = 64
STAGE_FILTERS = (256, 512, 1024, 2048)
BOTTLENECK = 4  # a unit's inner convolutions have a quarter of its filters
FC_SIGMA = 0.01


def _unit(ops: PlainOps, x: Feature, name: str, filters: int, stride: int, project: bool) -> Feature:
    """One bottleneck: 1 x 1, 3 x 3 with the stride, 1 x 1, added to the (projected) input."""
    inner = filters // BOTTLENECK
    y = ops.relu(ops.conv_bn(x, f"{name}_conv1", f"{name}_bn1", inner, kernel=1, stride=1), f"{name}_relu1")
    y = ops.relu(ops.conv_bn(y, f"{name}_conv2", f"{name}_bn2", inner, kernel=3, stride=stride), f"{name}_relu2")
    y = ops.conv_bn(y, f"{name}_conv3", f"{name}_bn3", filters, kernel=1, stride=1)
    shortcut = x
    if project:
        shortcut = ops.conv_bn(x, f"{name}_conv1sc", f"{name}_bnsc", filters, kernel=1, stride=stride)
    return ops.add_relu(y, shortcut, f"{name}_relu3")


def build(ops: PlainOps, config: Config, classes: int) -> Any:
    """The network as a symbol: arguments data (config.batch_shape) and softmax_label (batch,); output (batch, classes)."""
    x = ops.relu(ops.conv_bn(ops.input("data"), "conv0", "bn0", STEM_FILTERS, kernel=7, stride=2), "relu0")
    x = ops.max_pool(x, "pool0")
    for stage, (units, filters) in enumerate(zip(UNITS[config.num_layers], STAGE_FILTERS), start=1):
        for unit in range(1, units + 1):
            first = unit == 1
            x = _unit(ops, x, f"stage{stage}_unit{unit}", filters, stride=2 if first and stage > 1 else 1, project=first)
    return ops.head(x, classes)


def parameter_names(num_layers: int) -> List[str]:
    """The trainable parameters in the order of the network: 161 names for 50 layers."""
    pairs = [("conv0", "bn0")]
    for stage, units in enumerate(UNITS[num_layers], start=1):
        for unit in range(1, units + 1):
            inside = [("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")] + [("conv1sc", "bnsc")] * (unit == 1)
            pairs += [(f"stage{stage}_unit{unit}_{conv}", f"stage{stage}_unit{unit}_{bn}") for conv, bn in inside]
    names = [name for conv, bn in pairs for name in (f"{conv}_weight", f"{bn}_gamma", f"{bn}_beta")]
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
        rules = {".*bn3_gamma$": _LastGammaZero(), **rules}
    else:
        rules = {"^fc1_weight$": mx.init.Normal(FC_SIGMA), **rules}
    return mx.init.Mixed(list(rules), list(rules.values()))
