# SPDX-License-Identifier: Apache-2.0
"""The ways to compute the network that gpu_training.py checks."""

from dataclasses import dataclass
from typing import Tuple


@dataclass(frozen=True)
class Variant:
    """A way to compute the network.

    Attributes:
        dtype: Precision.
        layout: Layout of the input, convolutions, batch norms and poolings.
        own_batch_norms: Whether to use this project's batch norms.
        devices: Where it can run.
    """

    dtype: str
    layout: str
    own_batch_norms: bool = False
    devices: Tuple[str, ...] = ("gpu",)


VARIANTS = {  # in the order of worth on a GPU
    "float16-nhwc-own": Variant("float16", "NHWC", True),
    "float16-nhwc-public": Variant("float16", "NHWC"),
    "float16-nchw-public": Variant("float16", "NCHW"),
    "float32-nchw-public": Variant("float32", "NCHW", devices=("gpu", "cpu")),
    "float32-nhwc-public": Variant("float32", "NHWC"),
    # These prove on a CPU that this program notices what it should and nothing else.
    "float32-nchw-own": Variant("float32", "NCHW", True, ("cpu",)),
    "bfloat16-nchw-public": Variant("bfloat16", "NCHW", devices=("cpu",)),
}
