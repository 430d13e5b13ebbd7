# SPDX-License-Identifier: Apache-2.0
"""Bind one rank to the CPUs, the memory and the network adapter near its GPU (bind.sh).

The NUMA node of a GPU comes from nvidia-smi and /sys, not from a list of machines. A rank without a
GPU gets one of the nodes in turn. Only CPUs that this process may use are given to ranks, so the
launcher must not have bound the rank before (mpirun --bind-to none, srun --cpu-bind=none).
What cannot be bound is left unbound; one line on standard error reports the result.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Dict, List, Mapping, NoReturn, Optional, Tuple

from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch.processes import capture_output, find_program, replace_process
from mxresnet.launch.terminal import print_to_stderr
from mxresnet.launch.topology import Topology

_CHOICES = {
    "cpu": ("node", "exclusive", "exclusive,nosmt", "off"),
    "mem": ("node", "off"),
    "ib": ("single", "off"),
}
_USAGE = "./bind.sh [--cpu=...] [--mem=...] [--ib=...] -- command"


@dataclass(frozen=True)
class BindOptions:
    """What to bind a rank to; bind.sh documents the values."""

    cpu: str = "node"
    mem: str = "node"
    ib: str = "off"


@dataclass(frozen=True)
class LocalRank:
    """The number of this rank among the ranks of its machine, and their count."""

    rank: int  # from 0
    size: int  # number of ranks on this machine


@dataclass(frozen=True)
class Binding:
    """The CPUs and the memory that a rank is bound to."""

    node: int  # NUMA node
    cpus: str  # in the form of a kernel CPU list, as in 0-3,8; empty: any
    prefer_memory: bool  # whether to allocate memory on the node first


def format_cpu_list(cpus: List[int]) -> str:
    """Return CPU numbers in the form of a kernel CPU list, as in 0-3,8."""
    ranges: List[List[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_arguments(arguments: List[str]) -> Tuple[BindOptions, List[str]]:
    """Split arguments into the options and the command after them.

    Raises:
        UserError: An option or its value is unknown.
    """
    values: Dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        flag, equals, value = word.partition("=")
        name = flag[2:]
        if not flag.startswith("--") or name not in (*_CHOICES, "cluster"):
            raise UserError(f"{word} is not an option: use --cpu, --mem and --ib")
        if not equals:
            if not rest:
                raise UserError(f"{flag} needs a value")
            value = rest.pop(0)
        if name == "cluster":
            raise UserError("--cluster is not needed: the adapters come from this machine's /sys")
        if value not in _CHOICES[name]:
            raise UserError(f"{flag}={value}: use one of: {' '.join(_CHOICES[name])}")
        values[name] = value
    return BindOptions(**values), rest


def find_local_rank(environ: Mapping[str, str]) -> LocalRank:
    """Return the number of this rank on its machine, from the variables of Open MPI or Slurm.

    Raises:
        UserError: The value of a variable is not a number, or is far too large.
    """
    rank, size = "0", "1"
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        if environ.get(name):
            rank = environ[name]
            if not _is_count(rank):
                raise UserError(f"{name}={rank} is not a rank: it must be a whole number")
            break
    for name in (
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
        "DGXNGPU",
    ):
        if environ.get(name):
            # Slurm writes 8(x4) for 8 ranks on each of 4 machines.
            size = re.split("[(,]", environ[name])[0]
            if not _is_count(size):
                raise UserError(f"{name}={environ[name]} is not a number of ranks on a machine")
            break
    return LocalRank(int(rank), max(int(size), int(rank) + 1))


def _is_count(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None


def _tool_works(command: List[str], environ: Mapping[str, str]) -> bool:
    """Return whether a binding tool is installed and works: a container may forbid binding."""
    if not find_program(command[0], environ):
        return False
    try:
        done = capture_output([*command, "true"], environ)
    except OSError:
        return False
    return done.returncode == 0


def choose_tool(
    binding: Binding, several_nodes: bool, environ: Mapping[str, str]
) -> Tuple[List[str], List[str]]:
    """Choose the tool that binds a command.

    Returns:
        The words to put before the command, and notes for the report.
    """
    notes = []
    numactl = ["numactl"]
    if binding.cpus:
        numactl.append(f"--physcpubind={binding.cpus}")
    if binding.prefer_memory:
        numactl.append(f"--preferred={binding.node}")
    if len(numactl) > 1 and _tool_works(numactl, environ):
        return numactl, [f"memory of node {binding.node} first"] if binding.prefer_memory else []
    if binding.prefer_memory and several_nodes:
        notes.append("memory not bound (numactl is missing or forbidden)")
    if not binding.cpus:
        return [], notes
    taskset = ["taskset", "-c", binding.cpus]
    if _tool_works(taskset, environ):
        return taskset, notes
    return [], [*notes, "CPUs NOT bound (numactl and taskset are missing or forbidden)"]


def _choose_cpus(
    options: BindOptions, topology: Topology, local: LocalRank
) -> Tuple[Optional[List[int]], List[str]]:
    """Return the CPUs for a rank (None: any) and notes for the report."""
    node_cpus = topology.cpus_of_node[topology.node_of_rank(local.rank, local.size)]
    if options.cpu == "off":
        return None, []
    if options.cpu == "node":
        return node_cpus, []
    share = topology.share_of_cores(
        local.rank, local.size, use_smt=options.cpu != "exclusive,nosmt"
    )
    if share is None:
        return node_cpus, ["fewer cores than ranks: shared"]
    return share, []


def bound_command(
    options: List[str], command: List[str], environ: Mapping[str, str]
) -> Tuple[List[str], Dict[str, str]]:
    """Return a command with the binding tool in front of it, and the environment for it.

    Report the binding in one line on standard error.

    Args:
        options: Options of bind.sh, without a command.
        command: The rank's command.
        environ: Environment of the rank, with the launcher's variables.

    Raises:
        UserError: An option is unknown.
    """
    parsed, rest = parse_arguments(options)
    if rest:
        raise UserError(f"{rest[0]} is not an option: use --cpu, --mem and --ib")
    return _bind(parsed, command, environ)


def _bind(
    options: BindOptions, command: List[str], environ: Mapping[str, str]
) -> Tuple[List[str], Dict[str, str]]:
    """Return a command with the binding tool in front of it, and its environment; report both."""
    result = dict(environ)
    local = find_local_rank(environ)
    topology = Topology.detect(environ, local.rank, local.size)
    node = topology.node_of_rank(local.rank, local.size)
    notes = []
    if topology.gpus:
        # The CUDA library numbers GPUs by speed unless this is set; nvidia-smi by PCI address.
        result["CUDA_DEVICE_ORDER"] = environ.get("CUDA_DEVICE_ORDER") or "PCI_BUS_ID"
        if local.rank in topology.gpus:
            notes.append(f"GPU {topology.gpus[local.rank]}")
    cpus, cpu_notes = _choose_cpus(options, topology, local)
    notes += cpu_notes
    if options.ib == "single" and not environ.get("UCX_NET_DEVICES"):
        adapter = topology.adapter_of_rank(local.rank, local.size)
        if adapter:
            result["UCX_NET_DEVICES"] = f"{adapter}:1"
            notes.append(f"adapter {adapter}")
    cpu_list = "" if cpus is None else format_cpu_list(cpus)
    binding = Binding(node, cpu_list, options.mem == "node")
    tool, tool_notes = choose_tool(binding, len(topology.cpus_of_node) > 1, result)
    report = ", ".join([f"NUMA node {node}", f"CPUs {cpu_list or 'any'}", *notes, *tool_notes])
    print_to_stderr(f"bind.sh: rank {local.rank} of {local.size} here: {report}")
    return [*tool, *command], result


def main() -> NoReturn:
    """Replace this process with the command in the arguments, bound."""
    try:
        options, command = parse_arguments(sys.argv[1:])
        if not command or not command[0]:
            raise UserError(f"no command: {_USAGE}")
        command, environ = _bind(options, command, os.environ)
    except UserError as error:
        print_to_stderr(f"bind.sh: {error}")
        sys.exit(ExitStatus.USER_ERROR)
    try:
        replace_process(command, environ)
    except UserError as error:
        print_to_stderr(f"bind.sh: {error}")
        # The exit statuses of a shell: 127 not found, 126 cannot be executed.
        sys.exit(127 if isinstance(error.__cause__, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
