# SPDX-License-Identifier: Apache-2.0
"""What must be the same when a run is resumed: settings, data set, ranks and versions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Dict, List, Mapping, Sequence

from mxresnet.config import Config, flag_of

# Settings of a machine, a process or a log, which change no step and no evaluation. The paths of
# the data set are among them: its content is compared by counts and sums.
LOCAL_SETTINGS = frozenset(
    (
        *("data_root", "data_train", "data_train_idx", "data_val", "data_val_idx"),
        *("num_classes", "num_examples", "num_val_examples"),  # compared as counts of the data
        *("seed", "gpus", "verbose", "lazy_init_sanity", "dali_threads", "dali_dont_use_mmap"),
        *("dali_nvjpeg_memory_padding", "dali_tmp_buffer_hint", "dali_decoder_buffer_hint"),
        *("dali_crop_buffer_hint", "dali_normalize_buffer_hint"),
        *("dali_preallocate_width", "dali_preallocate_height"),
        *("log_file", "expected_ranks", "watchdog_period", "watchdog_limit", "disp_batches"),
        *("checkpoint_dir", "profile_worker_suffix"),
        *("submission_org", "submission_platform", "submission_division", "submission_status"),
        "cache_cleared",
    )
)
# Settings that may differ when a run is resumed.
MAY_DIFFER = LOCAL_SETTINGS | {
    *("checkpoints", "checkpoint_minutes", "resume", "epoch_prof", "evaluate"),
}
_PACKAGES = (
    "mxnet",
    "mxnet-cu112",
    "horovod",
    "numpy",
    "nvidia-dali-cuda110",
    "nvidia-dali-cuda120",
)
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Fingerprint:
    """What determines the steps of a run, besides its seed.

    Attributes:
        settings: all settings by field of Config, also those of MAY_DIFFER.
        data: counts of the data set, and the SHA-256 of its manifests or the sizes of its files.
        ranks: number of ranks.
        versions: of the packages that compute, and the kind of the input.
    """

    settings: Dict[str, Any]
    data: Dict[str, Any]
    ranks: int
    versions: Dict[str, str]

    def differences(self, other: Fingerprint, with_input_threads: bool = False) -> List[str]:
        """Return how another run differs, in the order of importance: "--lr 4, there 5".

        Args:
            other: fingerprint of a checkpoint.
            with_input_threads: whether --dali-threads must be the same too (ImageRecordIter gives
                each thread its own random numbers).
        """
        found = differing_settings(self.settings, other.settings, with_input_threads)
        if self.ranks != other.ranks:
            found.insert(0, f"{self.ranks} ranks, there {other.ranks}")
        for name in sorted({*self.data, *other.data}):
            if self.data.get(name) != other.data.get(name):
                found.append(f"the data set differs ({name})")
        for name in sorted({*self.versions, *other.versions}):
            now, then = self.versions.get(name, "none"), other.versions.get(name, "none")
            if now != then:
                found.append(f"{name} {now}, there {then}")
        return found


def differing_settings(
    settings: Mapping[str, Any], others: Mapping[str, Any], with_input_threads: bool = False
) -> List[str]:
    """Return the settings that must be the same and differ: "--lr 4, there 5"."""
    free = MAY_DIFFER - ({"dali_threads"} if with_input_threads else set())
    names = [name for name in {**settings, **others} if name not in free]
    found = []
    for name in names:
        now, then = settings.get(name), others.get(name)
        if now != then:
            flag = flag_of(name) if name in Config.__dataclass_fields__ else name
            found.append(f"{flag} {format_setting(now)}, there {format_setting(then)}")
    return found


def format_setting(value: Any) -> str:
    """Return the value of a setting as in a flag."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def effective_settings(config: Config) -> Dict[str, Any]:
    """Return the settings as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def describe_data(
    config: Config,
    train_examples: int,
    val_examples: int,
    classes: int,
    class_names: Sequence[str] = (),
) -> Dict:
    """Return the counts of the data set and what identifies its files, without reading records."""
    facts: Dict[str, Any] = {"train": train_examples, "val": val_examples, "classes": classes}
    if config.synth_data:
        return facts
    facts["class_names"] = list(class_names)
    for split in ("train", "val"):
        path = os.path.splitext(config.path(f"data_{split}"))[0] + ".json"
        if os.path.exists(path):
            facts[f"{split}_manifest"] = sha256_of(path)
        else:
            paths = (config.path(f"data_{split}"), config.path(f"data_{split}_idx"))
            facts[f"{split}_bytes"] = [os.path.getsize(path) for path in paths]
    return facts


def installed_versions() -> Dict[str, str]:
    """Return the versions of the packages that compute and are installed."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def sha256_of(path: str, size_bytes: int = -1) -> str:
    """Return the SHA-256 of a file, or of its first bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest, remaining = hashlib.sha256(), size_bytes
    with open(path, "rb") as file:
        while remaining:
            block = file.read(_BLOCK_BYTES if remaining < 0 else min(_BLOCK_BYTES, remaining))
            if not block:
                break
            digest.update(block)
            remaining -= len(block) if remaining > 0 else 0
    return digest.hexdigest()
