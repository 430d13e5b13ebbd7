# SPDX-License-Identifier: Apache-2.0
"""The manifest of a checkpoint, manifest.json, which is written last: its content as a class.

A checkpoint is a folder `epoch_<EEE>_step_<SSSSSS>`:

    model-symbol.json    the network for inference, of MXNet's stock operators, float32, NCHW
    model-0000.params    weights (float32, masters where the network's are float16) and running
                         statistics, averaged over the ranks, in MXNet's format
    optimizer.npz        momenta, by parameter
    rank_<RRRR>.npz      of each rank: its own running statistics, the state of its input and of its
                         random number generators
    manifest.json        this file

Nothing in it is a pickle: to load a checkpoint never executes code from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass
from typing import Any, Dict, Optional

from mxresnet.bounded_read import read_file
from mxresnet.checkpoint.fingerprint import Fingerprint

FORMAT, VERSION = "mxresnet-checkpoint", 1
FILE = "manifest.json"
SYMBOL_FILE, PARAMS_FILE, OPTIMIZER_FILE = "model-symbol.json", "model-0000.params", "optimizer.npz"
_MAX_BYTES = 64 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


class DamagedError(Exception):
    """A checkpoint, or the description of a run, cannot be used. The message is one line."""


def rank_file(rank: int) -> str:
    """Return the name of the file with a rank's own state."""
    return f"rank_{rank:04d}.npz"


@dataclass(frozen=True, order=True)
class Position:
    """A point between two steps of a run.

    Attributes:
        epoch: the epoch of the last step; epochs count from 1.
        step: steps of this epoch that are done.
        evaluated: whether nothing of this epoch's block is left: the evaluation after it, if it has
            one, is done too.
    """

    epoch: int
    step: int
    evaluated: bool = False

    @property
    def folder_name(self) -> str:
        return f"epoch_{self.epoch:03d}_step_{self.step:06d}"


@dataclass(frozen=True)
class LogPosition:
    """How much of a log file was written at a checkpoint.

    Attributes:
        path: absolute path of the log.
        size_bytes: its size then.
        sha256: sum of these bytes.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FileFacts:
    """Size and SHA-256 (hexadecimal) of a file of the checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint contains and where it comes from.

    Attributes:
        run_id: random name of the run.
        position: where in the run it was taken.
        updates: optimizer updates done, the warm-up's included.
        seed: the run's effective seed.
        accuracy: of the evaluation at this position; None if there was none.
        best_accuracy: of all evaluations so far; None before the first one.
        is_best: whether `accuracy` is above that of all earlier evaluations.
        created: seconds since 1970.
        run_started: when the run started first, seconds since 1970.
        fingerprint: settings, data, ranks and versions of the run.
        log: the log file then; None without one.
        files: all other files of the folder, by name.
    """

    run_id: str
    position: Position
    updates: int
    seed: int
    accuracy: Optional[float]
    best_accuracy: Optional[float]
    is_best: bool
    created: float
    run_started: float
    fingerprint: Fingerprint
    log: Optional[LogPosition] = None
    files: Dict[str, FileFacts] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> Dict[str, Any]:
        """The effective settings, by field of Config; a tuple is a list here."""
        return self.fingerprint.settings

    def to_json(self) -> str:
        return format_json(FORMAT, dataclasses.asdict(self))


def format_json(file_format: str, content: Dict[str, Any]) -> str:
    """Return the text of a JSON file of this project, with its format, version and own sum."""
    content = {"format": file_format, "version": VERSION, **content}
    return json.dumps({**content, "sha256": _sum_of(content)}, indent=1) + "\n"


def _sum_of(content: Dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def parse_json_file(path: str, expected_format: str) -> Dict[str, Any]:
    """Return the content of a file that format_json() made, without what that added.

    Raises:
        DamagedError: it cannot be read, or is of another format or version.
    """
    name = os.path.basename(path)
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait for a writer
        raise DamagedError(f"{name} is not a regular file")
    try:
        content = json.loads(read_file(path, _MAX_BYTES).decode())
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{name} is damaged") from None
    if not isinstance(content, dict) or content.get("format") != expected_format:
        raise DamagedError(f"{name} is not of format {expected_format}")
    version = content.get("version")
    if version != VERSION or isinstance(version, bool):
        raise DamagedError(f"{name} is of version {version!r}, and this program reads {VERSION}")
    if content.pop("sha256", None) != _sum_of(content):
        raise DamagedError(f"{name} is damaged: its content is not that of its sum")
    return {key: value for key, value in content.items() if key not in ("format", "version")}


def read_manifest(folder: str) -> Manifest:
    """Return the manifest of a checkpoint; the other files are not read.

    Raises:
        DamagedError: it cannot be read or is not valid.
    """
    content = parse_json_file(os.path.join(folder, FILE), FORMAT)
    try:
        manifest = _parse(content)
    except (TypeError, ValueError, KeyError, AttributeError):
        raise DamagedError(f"{FILE} is damaged") from None
    if manifest.position.folder_name != os.path.basename(os.path.normpath(folder)):
        raise DamagedError(f"{FILE} is that of {manifest.position.folder_name}")
    return manifest


def _parse(content: Dict[str, Any]) -> Manifest:
    """Return the manifest; raise TypeError, ValueError or KeyError where a field is wrong."""
    files = {name: FileFacts(**facts) for name, facts in content.pop("files").items()}
    position = Position(**content.pop("position"))
    fingerprint = Fingerprint(**content.pop("fingerprint"))
    log = content.pop("log")
    manifest = Manifest(
        position=position,
        fingerprint=fingerprint,
        log=None if log is None else LogPosition(**log),
        files=files,
        **content,
    )
    integers = [position.epoch, position.step, manifest.updates, manifest.seed, fingerprint.ranks]
    integers += [facts.size_bytes for facts in files.values()]
    numbers = [manifest.created, manifest.run_started]
    numbers += [v for v in (manifest.accuracy, manifest.best_accuracy) if v is not None]
    expected = {SYMBOL_FILE, PARAMS_FILE, OPTIMIZER_FILE}
    expected |= {rank_file(rank) for rank in range(min(fingerprint.ranks, len(files)))}
    if (
        not all(type(value) is int and value >= 0 for value in integers)
        or not all(type(value) in (int, float) for value in numbers)
        or not all(
            isinstance(v, str) for v in [manifest.run_id, *(f.sha256 for f in files.values())]
        )
        or not all(type(v) is bool for v in (manifest.is_best, position.evaluated))
        or not all(
            isinstance(v, dict)
            for v in (fingerprint.settings, fingerprint.data, fingerprint.versions)
        )
        or not all(map(_FILE_NAME.fullmatch, files))
        or set(files) != expected
        or len(files) != fingerprint.ranks + 3
    ):
        raise ValueError(content)
    return manifest
