# SPDX-License-Identifier: Apache-2.0
"""CPUs, GPUs and network adapters of this machine, and which of them are near each rank's GPU.

Everything is read from /proc, /sys and nvidia-smi. Tests set BIND_ROOT to a folder that is used
instead of /.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Set, Tuple

from mxresnet.errors import UserError
from mxresnet.launch.processes import capture_output, find_program

_INFINIBAND_SCORE = 1000  # more than any number of common PCI components


def parse_cpu_list(text: str) -> List[int]:
    """Parse a kernel CPU list, as in 0-2,5."""
    cpus: List[int] = []
    for part in text.replace(",", " ").split():
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def _read_line(path: str) -> Optional[str]:
    """Return the first line of a file, stripped, or None when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().strip()
    except OSError:
        return None


def _read_node(folder: str) -> int:
    """Return the NUMA node of a PCI device; -1 when it is unknown."""
    text = _read_line(f"{folder}/numa_node") or ""
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else -1


def _list_folder(path: str, pattern: str) -> List[str]:
    """Return the names in a folder that match a pattern; none when it cannot be read."""
    try:
        return sorted(fnmatch.filter(os.listdir(path), pattern))
    except OSError:
        return []


def _common_prefix_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the number of leading elements that two sequences have in common."""
    equal = (one == other for one, other in zip(first, second))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def allowed_cpus(root: str) -> List[int]:
    """Return the CPUs that this process may use.

    Raises:
        UserError: /proc does not list them.
    """
    path = f"{root}/proc/self/status"
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key == "Cpus_allowed_list":
                    return sorted(parse_cpu_list(value))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    raise UserError(f"{path} has no Cpus_allowed_list")


def find_cpus(root: str, allowed: List[int]) -> Dict[int, List[int]]:
    """Return the CPUs that this process may use by NUMA node; nodes without any are left out."""
    usable = set(allowed)
    cpus_of_node: Dict[int, List[int]] = {}
    parent = f"{root}/sys/devices/system/node"
    names = _list_folder(parent, "node[0-9]*")
    for node in sorted(int(name[4:]) for name in names if name[4:].isdecimal()):
        cpus = parse_cpu_list(_read_line(f"{parent}/node{node}/cpulist") or "")
        cpus = [cpu for cpu in cpus if cpu in usable]
        if cpus:
            cpus_of_node[node] = cpus
    return cpus_of_node or {0: allowed}  # a kernel without NUMA has no nodes


def assign_gpus(visible: List[str], rank: int, ranks: int) -> Dict[int, str]:
    """Return the GPU of each local rank, as far as this rank can know it.

    A scheduler may show each rank only its own GPU (srun --gpus-per-task=1): then those of the
    other ranks are not known.

    Args:
        visible: The GPUs that this rank sees.
        rank: Local rank.
        ranks: Ranks on this machine.
    """
    if len(visible) == 1 and ranks > 1:
        return {rank: visible[0]}
    return dict(enumerate(visible[:ranks]))


def find_gpus(environ: Mapping[str, str]) -> List[str]:
    """Return the PCI addresses of the visible GPUs, in the order in which ranks take them."""
    nvidia_smi = find_program("nvidia-smi", environ)
    if not nvidia_smi:
        return []
    try:
        output = capture_output(
            [nvidia_smi, "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"], environ
        ).stdout
    except OSError:
        return []
    found: List[str] = []
    address_of: Dict[str, str] = {}
    for line in output.splitlines():
        fields = [part.strip() for part in line.split(",")]
        if len(fields) == 3 and re.search(r":.*:.*\.", fields[2]):
            address = fields[2].lower()[-12:]  # nvidia-smi writes 8 digits of PCI domain, /sys 4
            found.append(address)
            address_of[fields[0]] = address_of[fields[1]] = address
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    wanted = visible.replace(",", " ").split()
    return [address_of[name] for name in wanted if name in address_of]


@dataclass(frozen=True)
class Topology:
    """The hardware of this machine that ranks share, as far as this process may use it."""

    root: str  # prefix of /proc and /sys
    cpus_of_node: Dict[int, List[int]]  # in ascending order of the nodes
    allowed: List[int]  # CPUs
    gpus: Dict[int, str]  # PCI addresses as in /sys, by local rank; see assign_gpus()

    @staticmethod
    def detect(environ: Mapping[str, str], rank: int, ranks: int) -> Topology:
        """Read the hardware of this machine.

        Args:
            environ: Environment of the rank.
            rank: Local rank.
            ranks: Ranks on this machine.

        Raises:
            UserError: /proc cannot be read.
        """
        root = environ.get("BIND_ROOT", "")
        allowed = allowed_cpus(root)
        gpus = assign_gpus(find_gpus(environ), rank, ranks)
        return Topology(root, find_cpus(root, allowed), allowed, gpus)

    def _gpu_folder(self, rank: int) -> Optional[str]:
        """Return the folder of a rank's GPU in /sys, or None when the rank has no GPU."""
        if rank not in self.gpus:
            return None
        return f"{self.root}/sys/bus/pci/devices/{self.gpus[rank]}"

    def _knows_only(self, rank: int) -> bool:
        """Return whether this rank's GPU is known, and none of the others."""
        return list(self.gpus) == [rank]

    def node_of_rank(self, rank: int, ranks: int) -> int:
        """Return the NUMA node of a rank's GPU.

        A rank without a GPU, or with one whose node is unknown or has no CPU for this process, gets
        one of the nodes in turn.
        """
        folder = self._gpu_folder(rank)
        node = _read_node(folder) if folder else -1
        if node in self.cpus_of_node:
            return node
        nodes = list(self.cpus_of_node)
        return nodes[rank * len(nodes) // ranks]

    def _cores_of_node(self, node: int) -> List[List[int]]:
        """Return the cores of a node, each as its usable hardware threads."""
        cores: List[List[int]] = []
        seen: Set[int] = set()
        for cpu in self.cpus_of_node[node]:
            if cpu in seen:
                continue
            path = f"{self.root}/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
            siblings = parse_cpu_list(_read_line(path) or str(cpu))
            cores.append([sibling for sibling in siblings if sibling in self.allowed])
            seen.update(siblings)
        return cores

    def share_of_cores(self, rank: int, ranks: int, use_smt: bool) -> Optional[List[int]]:
        """Return the CPUs of a rank's share of the cores of its node.

        Where the GPUs of the other ranks are not known, all of them may be on this node.

        Args:
            rank: Local rank.
            ranks: Ranks on this machine.
            use_smt: Whether to use all hardware threads of a core, or only the first.

        Returns:
            CPU numbers; None when the node has fewer cores than ranks.
        """
        node = self.node_of_rank(rank, ranks)
        sharing = list(range(ranks))
        if not self._knows_only(rank):
            sharing = [other for other in sharing if self.node_of_rank(other, ranks) == node]
        cores = self._cores_of_node(node)
        if len(cores) < len(sharing):
            return None
        position = sharing.index(rank)
        start, end = (number * len(cores) // len(sharing) for number in (position, position + 1))
        return [cpu for core in cores[start:end] for cpu in (core if use_smt else core[:1])]

    def _adapter_scores(self, rank: int) -> List[Tuple[int, str]]:
        """Return a score, higher for nearer, and the name of each active network adapter.

        Nearest is the adapter with the most PCI components in common with the rank's GPU, then one
        on the same NUMA node. InfiniBand ports come before Ethernet ports, which on many machines
        are for storage.
        """
        gpu_folder = self._gpu_folder(rank)
        gpu_path = os.path.realpath(gpu_folder).split("/") if gpu_folder else []
        gpu_node = _read_node(gpu_folder) if gpu_folder else -1
        scores = []
        for name in _list_folder(f"{self.root}/sys/class/infiniband", "*"):
            folder = f"{self.root}/sys/class/infiniband/{name}"
            if "ACTIVE" not in (_read_line(f"{folder}/ports/1/state") or ""):
                continue
            path = os.path.realpath(f"{folder}/device").split("/")
            score = 2 * _common_prefix_length(gpu_path, path)
            score += int(gpu_node >= 0 and _read_node(f"{folder}/device") == gpu_node)
            if _read_line(f"{folder}/ports/1/link_layer") == "InfiniBand":
                score += _INFINIBAND_SCORE
            scores.append((score, name))
        return scores

    def nearest_adapters(self, rank: int) -> List[str]:
        """Return the names of the active network adapters that are nearest to a rank's GPU."""
        scores = self._adapter_scores(rank)
        best = max((score for score, _ in scores), default=0)
        return [name for score, name in scores if score == best]

    def adapter_of_rank(self, rank: int, ranks: int) -> Optional[str]:
        """Return the adapter of a rank. Ranks with the same nearest adapters share them evenly."""
        nearest = self.nearest_adapters(rank)
        if not nearest:
            return None
        if self._knows_only(rank):
            return nearest[rank % len(nearest)]
        sharing = [other for other in range(ranks) if self.nearest_adapters(other) == nearest]
        return nearest[sharing.index(rank) * len(nearest) // len(sharing)]
