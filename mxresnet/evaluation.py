# SPDX-License-Identifier: Apache-2.0
"""Use the weights of a checkpoint in a run (--init-from) or an evaluation (--evaluate)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Tuple

from mxresnet import saved_model
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.metrics import Score
from mxresnet.saved_model import SavedModel, portable


def without_gpu(config: Config) -> Tuple[Config, List[str]]:
    """Return the settings of an evaluation on a CPU, and notes on what has changed."""
    if config.dtype != "float16":
        return config, []
    return portable(config), [
        "no GPU is found: this network of float16 is evaluated in float32, in NCHW"
    ]


def load(path: str, dataset: DataSet, rank: int) -> Optional[SavedModel]:
    """Return the checkpoint to evaluate on a data set, on rank 0; None on the others.

    Raises:
        UserError: it cannot be used, or the data set has other classes than its network.
    """
    if rank != 0:
        return None
    saved = saved_model.load(path)
    if saved.has_other_classes(dataset):
        found = "other classes"
        if dataset.classes != saved.classes:
            found = f"{dataset.classes} classes and the network {saved.classes}"
        raise UserError(
            f"the data set is not that of checkpoint {saved.path}: it has {found}: name the right "
            "one (--data-root)"
        )
    return saved


def check_score(score: Score, dataset: DataSet) -> None:
    """Raise UserError if not every image of the validation set was counted exactly once."""
    if score.total != dataset.val_examples:
        raise UserError(
            f"the evaluation counted {score.total} images of {dataset.val_examples}: convert the "
            "data set again"
        )


def describe_score(saved: SavedModel, score: Score, top_k: int) -> str:
    """Return the result of an evaluation as lines of text."""
    text = f"accuracy {score.accuracy:.6f} ({score.correct} of {score.total})"
    if top_k:
        text += f", top-{top_k} {score.top_k_accuracy:.6f}"
    logged = saved.manifest.accuracy
    if logged is None:
        return text + f"; checkpoint {saved.path}, which was not written after an evaluation\n"
    return text + f"; the run logged {logged:.6f} for checkpoint {saved.path}\n"


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from; only rank 0, whose weights all ranks get, has a checkpoint.

    Attributes:
        saved: the checkpoint; None: random weights.
        new_head: whether the fully connected layer gets random weights nevertheless.
        notes: for the progress output.
    """

    saved: Optional[SavedModel] = None
    new_head: bool = False
    notes: Tuple[str, ...] = ()


def initial_weights(path: str, dataset: DataSet, rank: int) -> InitialWeights:
    """Return the weights that --init-from names, if it names any, on rank 0.

    Raises:
        UserError: the checkpoint cannot be used.
    """
    if not path or rank != 0:
        return InitialWeights()
    saved = saved_model.load(path)
    new_head = saved.has_other_classes(dataset)
    note = f"the initial weights are those of {saved.path} (--init-from)"
    if dataset.classes != saved.classes:
        counts = f"{dataset.classes} classes and the checkpoint {saved.classes}"
        note += f", but fc1 is new: the data set has {counts}"
    elif new_head:
        note += ", but fc1 is new: the data set has other classes"
    return InitialWeights(saved, new_head, (note,))
