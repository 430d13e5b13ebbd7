# SPDX-License-Identifier: Apache-2.0
"""Check that all ranks have the same settings and the same data set.

Each rank reads its own environment and its own files. A variable that a launcher did not pass to
another machine, or another data set there, would go unnoticed: the ranks would train with different
learning rates, or wait for each other without end.
"""

from __future__ import annotations

from typing import Any, Dict

from mxresnet.checkpoint.fingerprint import describe_data, effective_settings
from mxresnet.config import Config, flag_of
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# Settings that machines may have for themselves, or of which only rank 0's counts. The data is
# compared by its counts and manifests.
_OF_ONE_RANK = frozenset(
    (
        *("data_root", "data_train", "data_train_idx", "data_val", "data_val_idx"),
        *("num_classes", "num_examples", "num_val_examples"),
        *("seed", "gpus", "verbose", "lazy_init_sanity", "dali_threads", "dali_prefetch_queue"),
        *("dali_dont_use_mmap", "dali_cache_size", "dali_hw_decoder_load"),
        *("dali_nvjpeg_memory_padding", "dali_tmp_buffer_hint", "dali_decoder_buffer_hint"),
        *("dali_crop_buffer_hint", "dali_normalize_buffer_hint"),
        *("dali_preallocate_width", "dali_preallocate_height"),
        *("log_file", "expected_ranks", "watchdog_period", "watchdog_limit", "disp_batches"),
        *("checkpoint_dir", "profile_worker_suffix"),
        *("submission_org", "submission_platform", "submission_division", "submission_status"),
        "cache_cleared",
    )
)


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
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:16] or "empty"
