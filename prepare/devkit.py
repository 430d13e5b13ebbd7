# SPDX-License-Identifier: Apache-2.0
"""Read the ImageNet devkit (ILSVRC2012_devkit_t12), packed or unpacked: labels and image counts."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Dict, List, Optional

from prepare.devkit_files import GROUND_TRUTH_FILE, META_FILE, is_archive, read_devkit_files
from prepare.listing import SourceError


@dataclass
class Devkit:
    """The parts of the devkit that a conversion uses."""

    ground_truth: bytes  # one ILSVRC2012_ID a line, in the order of the validation images
    ids: List[int]  # ILSVRC2012_ID of each synset; not in the order of sorted synsets
    synsets: List[str]  # in the order of `ids`
    num_train_images: Optional[List[int]]  # in the order of `ids`; None: not in meta.mat


def is_devkit(path: str) -> bool:
    """Return whether `path` is a folder or a readable tar archive.

    The other kinds of label files are text files.
    """
    return os.path.isdir(path) or is_archive(path)


def read_validation_synsets(path: str) -> List[str]:
    """Return the synset of every validation image, in the order of image numbers.

    Raises:
        SourceError: the devkit is malformed.
    """
    devkit = read_devkit(path)
    synset_of_id = dict(zip(devkit.ids, devkit.synsets))
    try:
        return [synset_of_id[int(line)] for line in devkit.ground_truth.decode("utf-8-sig").split()]
    except (ValueError, KeyError) as error:
        raise SourceError(
            f"{path}: {GROUND_TRUTH_FILE}: {error} is not an ILSVRC2012_ID of its {META_FILE}"
        ) from None


def read_train_counts(path: str) -> Optional[Dict[str, int]]:
    """Return {synset: number of training images}, or None if the devkit does not contain them.

    Raises:
        SourceError: the devkit is malformed.
    """
    devkit = read_devkit(path)
    if devkit.num_train_images is None:
        return None
    return dict(zip(devkit.synsets, devkit.num_train_images))


def read_devkit(path: str) -> Devkit:
    """Read the devkit.

    Raises:
        SourceError: it is malformed, or SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise SourceError(
            f"{path}: reading its {META_FILE} needs scipy: install it, or give another --val-labels"
        ) from None
    try:
        files = read_devkit_files(path)
        table = loadmat(io.BytesIO(files[META_FILE]), squeeze_me=True)["synsets"].reshape(-1)
        has_counts = "num_train_images" in table.dtype.names
        return Devkit(
            ground_truth=files[GROUND_TRUTH_FILE],
            ids=[int(value) for value in table["ILSVRC2012_ID"]],
            synsets=[str(value) for value in table["WNID"]],
            num_train_images=(
                [int(value) for value in table["num_train_images"]] if has_counts else None
            ),
        )
    except Exception as error:  # SciPy and the compression modules raise many kinds of exceptions
        reason = " ".join(str(error).split())
        raise SourceError(
            f"{path}: cannot be read as the devkit "
            f"({GROUND_TRUTH_FILE} and {META_FILE} in data/): {reason}"
        ) from None
