# SPDX-License-Identifier: Apache-2.0
"""Batches for a rank. build() makes the pipelines before the clock starts; open() touches data for the first time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Batch:
    """image: NDArray of config.batch_shape and precision; label: float32 NDArray (batch,); real: images that count.

    The images behind the first `real` are padding. The arrays are overwritten two batches later.
    """

    image: Any
    label: Any
    real: int


def load() -> None:
    """Load DALI; must come before Horovod is loaded.

    Horovod loads libmxnet with its symbols visible to all. DALI, loaded after that, would call MXNet's copies of the
    C++ templates that both contain, which fit another C++ library, and crash at its first batch.
    """
    from mxresnet.pipeline import dali  # noqa: F401


def build(config: Any, dataset: Any, world: Any, device: Any, seed: int) -> Any:
    """Return the unopened pipelines of this rank; device is an MXNet context."""
    from mxresnet.pipeline import dali

    return dali.Pipelines(config, dataset, world, device, seed)
