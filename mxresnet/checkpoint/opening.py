# SPDX-License-Identifier: Apache-2.0
"""Open the checkpoints of a run: on every rank, before the run starts."""

from __future__ import annotations

import os
from typing import Optional

from mxresnet.checkpoint import choice
from mxresnet.checkpoint.fingerprint import (
    Fingerprint,
    describe_data,
    effective_settings,
    installed_versions,
)
from mxresnet.checkpoint.session import Session
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.parallel.world import World


def folder_of(config: Config) -> Optional[str]:
    """Return the folder for checkpoints of rank 0; None for a run without."""
    measures = config.profile or config.time_tags or config.nvtx_flag
    if not config.checkpoints or measures:
        return None
    if config.checkpoint_dir:
        return config.checkpoint_dir
    log = config.log_file
    if not log or (os.path.exists(log) and not os.path.isfile(log)):  # as /dev/null
        return None
    return os.path.splitext(log)[0] + choice.SUFFIX


def is_used(config: Config) -> bool:
    """Return whether rank 0 finds a run, which may be running; whether it fits is found later."""
    folder = folder_of(config)
    return folder is not None and choice.is_used(folder)


def open_session(config: Config, data: DataSet, world: World, backend: str) -> Session:
    """Return the checkpoints of this run, on every rank; rank 0 chooses where it continues.

    Args:
        config: the settings.
        data: the data set.
        world: the ranks.
        backend: name of the input's backend.

    Raises:
        UserError: the folder cannot be used, or its unfinished run is not this one.
    """
    folder = world.broadcast(folder_of(config))
    if folder is None:
        return Session(config, world, None, None)
    counts = (data.train_examples, data.val_examples, data.classes)
    fingerprint = Fingerprint(
        effective_settings(config),
        describe_data(config, *counts, data.class_names),
        world.size,
        {**installed_versions(), "input": backend},
    )

    def choose() -> Optional[choice.Choice]:
        if world.rank != 0:
            return None
        threads = backend == "image_record_iter"
        resume = config.resume == "auto"
        return choice.choose(folder, fingerprint, config.seed, resume, threads)

    chosen = world.run_on_all_ranks(choose)
    session = Session(config, world, fingerprint, chosen)
    session.load()
    return session
