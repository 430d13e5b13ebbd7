# SPDX-License-Identifier: Apache-2.0
"""Check that all ranks have the same settings and the same data set.

Each rank reads its own environment and its own files. A variable that a launcher did not pass to
another machine, or another data set there, would go unnoticed: the ranks would train with different
learning rates, or wait for each other without end.
"""

from __future__ import annotations

from typing import Any, Dict

from mxresnet.checkpoint.fingerprint import (
    LOCAL_SETTINGS,
    describe_data,
    effective_settings,
    format_setting,
)
from mxresnet.config import Config, flag_of
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# Settings that may differ between ranks.
_OF_ONE_RANK = LOCAL_SETTINGS | {"dali_prefetch_queue", "dali_cache_size", "dali_hw_decoder_load"}


def check_agreement(config: Config, data: DataSet, backend: str, world: World) -> None:
    """Compare what determines the steps of this rank with rank 0.

    Args:
        config: settings of this rank.
        data: data set of this rank.
        backend: name of the data loading backend of this rank.
        world: the ranks.

    Raises:
        CollectiveUserError: the settings or the data sets differ.
    """
    own = _facts(config, data, backend)
    first = world.broadcast(own)
    differing = [name for name in {**own, **first} if own.get(name) != first.get(name)]
    problem = None
    if differing:
        name = differing[0]
        problem = UserError(
            f"{name} is {_text(own.get(name))} here and {_text(first.get(name))} on rank 0: all "
            "ranks need the same settings and data (pass variables to other machines with mpirun "
            "-x, or use flags)"
        )
    world.raise_if_any_failed(problem)


def _facts(config: Config, data: DataSet, backend: str) -> Dict[str, Any]:
    """Return what must be the same on all ranks, by its name in the message."""
    settings = effective_settings(config)
    facts = {flag_of(name): settings[name] for name in settings if name not in _OF_ONE_RANK}
    counts = (data.train_examples, data.val_examples, data.classes)
    for name, value in describe_data(config, *counts).items():
        facts[f"the data set ({name})"] = value
    facts["the data loader"] = backend
    return facts


def _text(value: Any) -> str:
    return format_setting(value)[:16] or "empty"
