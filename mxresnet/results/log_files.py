# SPDX-License-Identifier: Apache-2.0
"""Find the logs that the arguments of a report name, as series of trials, and their hardware."""

from __future__ import annotations

import glob
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Pattern, Sequence

from mxresnet.bounded_read import read_file
from mxresnet.errors import UserError
from mxresnet.results.log_reader import finite_number
from mxresnet.results.run_figures import MAX_TEXT_CHARACTERS

MAX_SYSTEM_BYTES = 1 << 20
MAX_LOGS = 200
_TRIAL_LOG = re.compile(r"(.+)_(\d+)\.log$")
_RESULT = re.compile(r"result_(\d+)\.txt$")
_ROUND = re.compile(r"training_results_v(\d\.\d)\b")
# Shown fields of a system description, and their names in a report.
_SYSTEM_FIELDS = {
    "system_name": "system",
    "number_of_nodes": "machines",
    "host_processor_model_name": "CPU",
    "host_processors_per_node": "CPUs per machine",
    "host_memory_capacity": "memory",
    "accelerators_per_node": "accelerators per machine",
    "accelerator_model_name": "accelerator",
    "accelerator_memory_capacity": "accelerator memory",
    "framework": "framework",
    "other_software_stack": "software",
    "operating_system": "operating system",
}


@dataclass
class Series:
    """The logs of one series of trials.

    Attributes:
        name: Shown name; those of one report differ.
        paths: The logs in the order of the trials.
        submitter, system: From the description of the system, "" without one.
        hardware: Shown facts of that description.
        accelerator: Model of an accelerator, or "".
        accelerators: Their number in all machines, or None.
        round_hint: MLPerf's round in the path, such as "2.1".
    """

    name: str
    paths: List[str]
    submitter: str = ""
    system: str = ""
    hardware: Dict[str, str] = field(default_factory=dict)
    accelerator: str = ""
    accelerators: Optional[int] = None
    round_hint: Optional[str] = None


def find_series(arguments: Sequence[str], first_alone: bool = False) -> List[Series]:
    """Return the series that the arguments name: each folder, and the single logs together.

    Args:
        arguments: Paths of logs and folders.
        first_alone: A log that is the first argument is a series of its own.

    Raises:
        UserError: An argument does not exist or has no logs.
    """
    series: List[Series] = []
    logs: List[str] = []
    for number, argument in enumerate(arguments):
        if os.path.isdir(argument):
            series += _series_of_folder(argument)
        elif not os.path.isfile(argument):
            raise UserError(f"{argument} is not a log or a folder: name existing ones")
        elif number == 0 and first_alone:
            series.append(Series(os.path.basename(argument), [argument]))
        else:
            logs.append(argument)
    if logs:
        name = os.path.basename(logs[0]) if len(logs) == 1 else f"{len(logs)} logs"
        series.append(Series(name, logs))
    total = sum(len(one.paths) for one in series)
    if total > MAX_LOGS:
        raise UserError(f"the arguments name {total} logs, {MAX_LOGS} at most: name fewer")
    for one in series:
        path = os.path.abspath(one.paths[0])
        found = _ROUND.search(path)
        one.round_hint = found.group(1) if found else None
        description = _find_description(path)
        if description is not None:
            one.submitter = _system_text(description.get("submitter", ""))
            one.system = os.path.basename(os.path.dirname(os.path.dirname(path)))
            describe(one, description)
    _make_names_unique(series)
    return series


def _series_of_folder(folder: str) -> List[Series]:
    """Return the series in a folder: results of a submission, or logs of trials by stamp."""
    results = glob.glob(os.path.join(glob.escape(folder), "result_*.txt"))
    for pattern in ("resnet", "*/resnet", "results/*/resnet", "*/results/*/resnet"):
        results += glob.glob(os.path.join(glob.escape(folder), pattern, "result_*.txt"))
    by_folder: Dict[str, List[str]] = {}
    for path in results:
        if _RESULT.search(path) and os.path.isfile(path):  # a named pipe would block
            by_folder.setdefault(os.path.dirname(path), []).append(path)
    series = []
    for name, paths in sorted(by_folder.items()):
        parts = os.path.abspath(name).split(os.sep)
        label = parts[-2] if parts[-1] == "resnet" and len(parts) > 1 else parts[-1]
        series.append(Series(label, sorted(paths, key=lambda path: _number(_RESULT, path, 1))))
    if not series:
        series = _trials(folder)
    if not series:
        raise UserError(
            f"{folder} has no logs: it needs *.log or result_*.txt, or results/<system>/resnet"
        )
    return series


def _number(pattern: Pattern[str], path: str, group: int) -> int:
    found = pattern.search(path)
    return int(found.group(group)) if found else 0


def _trials(folder: str) -> List[Series]:
    """Return the logs <stamp>_<trial>.log of a folder by stamp, and all others as one series."""
    by_stamp: Dict[str, List[str]] = {}
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".log") and os.path.isfile(path):
            found = _TRIAL_LOG.match(name)
            by_stamp.setdefault(found.group(1) if found else "", []).append(path)
    label = os.path.basename(os.path.abspath(folder))
    return [
        Series(
            f"{label}/{stamp}" if len(by_stamp) > 1 and stamp else label,
            sorted(paths, key=lambda path: (_number(_TRIAL_LOG, path, 2), path)),
        )
        for stamp, paths in sorted(by_stamp.items())
    ]


def _make_names_unique(series: Sequence[Series]) -> None:
    """Number the series that have the same name."""
    counts: Dict[str, int] = {}
    for one in series:
        one.name = one.name[:MAX_TEXT_CHARACTERS]
        counts[one.name] = counts.get(one.name, 0) + 1
        if counts[one.name] > 1:
            one.name = f"{one.name} ({counts[one.name]})"


def describe(series: Series, description: Mapping[str, Any]) -> None:
    """Store the hardware and versions that MLPerf's description of a system has."""
    with_text = {key: _system_text(value) for key, value in description.items()}
    series.hardware = {
        label: with_text[key] for key, label in _SYSTEM_FIELDS.items() if with_text.get(key)
    }
    memory = re.search(r"\d+ ?Gi?B|\d+ ?MiB", with_text.get("accelerator_memory_capacity", ""))
    model = with_text.get("accelerator_model_name", "")
    series.accelerator = model
    if model and memory and not re.search(r"\d ?GB", model):
        series.accelerator = f"{model} {_as_gigabytes(memory.group(0))}"
    series.accelerators = _product(description, "number_of_nodes", "accelerators_per_node")


def _as_gigabytes(memory: str) -> str:
    """Return "40 GB" for nvidia-smi's "40960 MiB"."""
    number = re.match(r"\d+", memory)
    if number and memory.endswith("MiB"):
        return f"{round(int(number.group(0)) / 1024)} GB"
    return memory


def _product(description: Mapping[str, Any], *keys: str) -> Optional[int]:
    """Return the product of two fields; None when one is not a number above 0."""
    product = 1
    for key in keys:
        text = str(description.get(key, "")).strip()
        if not text.isdecimal() or not 0 < int(text[:9]) < 1_000_000:
            return None
        product *= int(text)
    return product


def _system_text(value: Any) -> str:
    """Return a field of a system description as one line."""
    if isinstance(value, (dict, list)):
        items = value if isinstance(value, list) else [value]
        words = []
        for item in items[:20]:
            if isinstance(item, dict):
                words += [f"{str(key).replace('_version', '')} {one}" for key, one in item.items()]
            else:
                words.append(str(item))
        value = ", ".join(words)
    if isinstance(value, bool) or (not isinstance(value, str) and finite_number(value) is None):
        return ""
    text = " ".join(str(value).split())[:MAX_TEXT_CHARACTERS]
    return "" if text.lower() in ("n/a", "none") else text


def _find_description(log: str) -> Optional[Dict[str, Any]]:
    """Return systems/<system>.json of results/<system>/resnet/<log>, or None."""
    system_folder = os.path.dirname(os.path.dirname(log))
    root = os.path.dirname(os.path.dirname(system_folder))
    path = os.path.join(root, "systems", os.path.basename(system_folder) + ".json")
    try:
        content = json.loads(read_file(path, MAX_SYSTEM_BYTES).decode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
