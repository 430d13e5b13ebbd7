# SPDX-License-Identifier: Apache-2.0
"""The distributions that the first weights of the network are drawn from."""

from __future__ import annotations

from typing import Any

import mxnet as mx

from mxresnet.config import Config
from mxresnet.model.resnet import MIN_BOTTLENECK_LAYERS

FC_SIGMA = 0.01


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
