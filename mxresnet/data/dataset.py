# SPDX-License-Identifier: Apache-2.0
"""What is known of a data set without reading a record: the files' presence, and what `prepare` wrote in its manifests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional

from mxresnet.config import Config
from mxresnet.errors import UserError

IMAGENET = {"train": 1281167, "val": 50000, "classes": 1000}
MANIFEST_VERSION = 1
DAMAGED = "(python -m prepare.verify finds a damaged record, --check=decode of prepare.imagenet an image that never was one)"
_HOW = "make it with: python -m prepare.imagenet SOURCE DESTINATION"


@dataclass(frozen=True)
class DataSet:
    """Images and classes of a data set; has_manifests is false when the counts are the settings' word only."""

    train_examples: int
    val_examples: int
    classes: int
    has_manifests: bool


def _read_manifest(records: str) -> Optional[Dict[str, Any]]:
    """Return the manifest beside a .rec file, or None when there is none. Raises UserError when it is not whole."""
    path = os.path.splitext(records)[0] + ".json"
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"manifest {path} cannot be read ({error}): make the data set again"
        ) from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != "mxresnet-recordio"
        or manifest.get("version") != MANIFEST_VERSION
    ):
        raise UserError(
            f"manifest {path} is not of format mxresnet-recordio version {MANIFEST_VERSION}: {_HOW}"
        )
    if not manifest.get("complete"):
        raise UserError(
            f"manifest {path} says that the data set is not whole: run python -m prepare.imagenet again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(about, dict) and "bytes" in about for about in files.values()
    ):
        raise UserError(
            f"manifest {path} does not say which files belong to it: make the data set again"
        )
    for name, about in files.items():
        if not name.endswith((".rec", ".idx")):
            continue  # what training does not read
        file_path = os.path.join(os.path.dirname(path), name)
        size = os.path.getsize(file_path) if os.path.exists(file_path) else None
        if size != about["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"{file_path} {found}, its manifest {path} says {about['bytes']} bytes: make the data set again"
            )
    return manifest


def _check_file(path: str, what: str) -> None:
    if not os.path.isfile(path):
        raise UserError(
            f"{what} {path} do not exist: give --data-root the folder of the data set, or {_HOW}"
        )
    if not os.access(path, os.R_OK):
        raise UserError(f"{what} {path} cannot be read by this user: change its permissions")
    if os.path.getsize(path) == 0:
        raise UserError(f"{what} {path} are empty: {_HOW}")


def _as_set(config: Config, has_manifests: bool) -> DataSet:
    return DataSet(
        config.num_examples or IMAGENET["train"],
        config.num_val_examples or IMAGENET["val"],
        config.num_classes or IMAGENET["classes"],
        has_manifests,
    )


def describe(config: Config) -> DataSet:
    """Find the data set of `config` and its counts. Raises UserError when it is missing, damaged or another one."""
    if config.synth_data:
        return _as_set(config, has_manifests=True)
    manifests = {}
    for prefix, name in (("train", "training"), ("val", "validation")):
        _check_file(config.path(f"data_{prefix}"), f"{name} records")
        _check_file(config.path(f"data_{prefix}_idx"), f"index of the {name} records")
        manifests[prefix] = _read_manifest(config.path(f"data_{prefix}"))
    train, val = manifests["train"], manifests["val"]
    if train is None or val is None:
        return _as_set(config, has_manifests=False)
    names = [[entry["name"] for entry in manifest["classes"]] for manifest in (train, val)]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[:3]
        raise UserError(
            f"training and validation set have different classes (such as {', '.join(odd)}): make the data set again"
        )
    classes = len(names[0])
    for flag, asked, found in (
        ("--num-classes", config.num_classes, classes),
        ("--num-val-examples", config.num_val_examples, val["examples"]),
    ):
        if asked not in (0, found):
            raise UserError(
                f"{flag} {asked}, but the data set in {os.path.dirname(config.path('data_train'))} has {found}"
            )
    if config.num_examples > train["examples"]:
        raise UserError(
            f"--num-examples {config.num_examples}, but the data set has only {train['examples']}"
        )
    return DataSet(config.num_examples or train["examples"], val["examples"], classes, True)
