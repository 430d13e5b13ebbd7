# SPDX-License-Identifier: Apache-2.0
"""bind.sh on machines of several shapes, built as a stand-in for / with stand-ins for the tools."""

import os
import shutil
import subprocess

import pytest
from support.commands import ROOT

TOOLS = ("bash", "env", "seq", "sort", "awk", "paste", "readlink", "true")
# A DGX A100 as NVIDIA documents it: 8 NUMA nodes of 16 cores, the GPUs in pairs on four of them.
DGX_NODES = [3, 3, 1, 1, 7, 7, 5, 5]


def stand_in(folder, name, text):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


class Machine:
    """A made-up machine: NUMA nodes of cores, GPUs and adapters on some of them. SMT siblings come after all cores."""

    def __init__(
        self, folder, nodes, cores, smt, gpus, binders=("numactl", "taskset"), allowed=None
    ):
        self.root, self.path, self.nodes = folder / "root", folder / "bin", nodes
        total = nodes * cores
        self.write(
            "proc/self/status",
            f"Name:\tbash\nCpus_allowed_list:\t{allowed or f'0-{total * smt - 1}'}\n",
        )
        for node in range(nodes):
            first = node * cores
            ranges = [f"{first + i * total}-{first + i * total + cores - 1}" for i in range(smt)]
            self.write(f"sys/devices/system/node/node{node}/cpulist", ",".join(ranges) + "\n")
        for cpu in range(total * smt):
            siblings = ",".join(str(cpu % total + i * total) for i in range(smt))
            self.write(
                f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings + "\n"
            )
        self.path.mkdir()
        for tool in TOOLS:
            os.symlink(shutil.which(tool), self.path / tool)
        for binder in binders:
            stand_in(self.path, binder, f'echo {binder} "$@"\n')
        rows = [self.add_gpu(index, node) for index, node in enumerate(gpus)]
        if rows:
            stand_in(self.path, "nvidia-smi", "".join(f"echo '{row}'\n" for row in rows))

    def write(self, name, text):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def add_gpu(self, index, node):
        bus = f"0000:{16 * index + 7:02x}:00.0"
        place = f"sys/devices/pci0000:{max(node, 0):02x}/switch{index // 2}/{bus}"
        self.write(f"{place}/numa_node", f"{node}\n")
        (self.root / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
        os.symlink(self.root / place, self.root / "sys/bus/pci/devices" / bus)
        return f"{index}, GPU-{index:04d}, 0000{bus.upper()}"

    def add_adapter(self, name, node, switch, state="4: ACTIVE", layer="InfiniBand"):
        place = f"sys/devices/pci0000:{node:02x}/switch{switch}/{name}"
        self.write(f"{place}/numa_node", f"{node}\n")
        self.write(f"sys/class/infiniband/{name}/ports/1/state", state + "\n")
        self.write(f"sys/class/infiniband/{name}/ports/1/link_layer", layer + "\n")
        os.symlink(self.root / place, self.root / "sys/class/infiniband" / name / "device")

    def bind(self, rank, ranks, *options, command=("env",), **environ):
        """Return what the rank's command was run with, and what bind.sh said."""
        env = {
            "PATH": str(self.path),
            "BIND_ROOT": str(self.root),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(ranks),
            **environ,
        }
        done = subprocess.run(
            [shutil.which("bash"), "./bind.sh", *options, "--", *command],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(
            f"bind.sh: rank {rank} of {ranks} here: "
        )
        return done.stdout.strip(), done.stderr


def cpus(text):
    return {
        cpu
        for part in text.split(",")
        for cpu in range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)
    }


def bound(output):
    words = output.split()
    return cpus(words[1].split("=")[1] if words[0] == "numactl" else words[2])


@pytest.fixture
def dgx(tmp_path):
    machine = Machine(tmp_path, nodes=8, cores=16, smt=2, gpus=DGX_NODES)
    for number, (node, switch) in enumerate(
        [(3, 0), (3, 0), (1, 1), (1, 1), (5, 9), (7, 9), (7, 2), (7, 2), (5, 3), (5, 3)]
    ):
        machine.add_adapter(
            f"mlx5_{number}", node, switch, layer="Ethernet" if number in (4, 5) else "InfiniBand"
        )
    return machine


def test_on_a_dgx_each_rank_gets_its_share_of_the_node_of_its_gpu(dgx):
    given = []
    for rank, node in enumerate(DGX_NODES):
        output, said = dgx.bind(rank, 8, "--cpu=exclusive")
        assert output.startswith("numactl ") and f"--preferred={node} env" in output
        mine = bound(output)
        assert mine <= set(range(16 * node, 16 * node + 16)) | set(
            range(128 + 16 * node, 144 + 16 * node)
        )
        assert {cpu ^ 128 for cpu in mine} == mine and len(mine) == 16, (
            "8 cores with their hyper-threads"
        )
        given += mine
        assert f"GPU 0000:{16 * rank + 7:02x}:00.0" in said and f"NUMA node {node}" in said
    assert len(given) == len(set(given)) == 128


def test_on_a_dgx_each_rank_gets_its_own_adapter_beside_its_gpu_and_never_a_storage_port(dgx):
    used = []
    for rank in range(8):
        _, said = dgx.bind(rank, 8, "--cpu=off", "--mem=off", "--ib=single")
        used.append(said.split("adapter ")[1].strip())
    assert used == [f"mlx5_{n}" for n in (0, 1, 2, 3, 6, 7, 8, 9)]
    output, said = dgx.bind(0, 8, "--cpu=off", "--mem=off", "--ib=single")
    assert (
        "UCX_NET_DEVICES=mlx5_0:1" in output.split()
        and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in output.split()
    )
    output, said = dgx.bind(0, 8, "--cpu=off", "--mem=off", "--ib=single", UCX_NET_DEVICES="mine:1")
    assert "UCX_NET_DEVICES=mine:1" in output.split() and "adapter" not in said


def test_an_adapter_that_is_down_is_not_used(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1])
    machine.add_adapter("mlx5_0", 0, 0, state="1: DOWN")
    machine.add_adapter("mlx5_1", 1, 8)
    for rank in range(2):
        assert "adapter mlx5_1," in machine.bind(rank, 2, "--ib=single")[1]


@pytest.mark.parametrize("binders, begins", [(("taskset",), "taskset -c 4-7 "), ((), "OMPI")])
def test_without_numactl_or_taskset_it_does_what_it_can_and_says_so(tmp_path, binders, begins):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1], binders=binders)
    output, said = machine.bind(1, 2, command=("env",))
    assert (
        begins in output and "memory not bound" in said and ("NOT bound" in said) == (not binders)
    )


def test_a_forbidden_numactl_is_not_used(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1])
    stand_in(machine.path, "numactl", "echo 'set_mempolicy: Operation not permitted' >&2; exit 1\n")
    assert machine.bind(1, 2)[0] == "taskset -c 4-7 env"


@pytest.mark.parametrize(
    "smt, option, expected",
    [
        (1, "exclusive", [{0, 1}, {2, 3}]),
        (2, "exclusive", [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        (2, "exclusive,nosmt", [{0, 1}, {2, 3}]),
    ],
)
def test_hyper_threads(tmp_path, smt, option, expected):
    machine = Machine(tmp_path, nodes=1, cores=4, smt=smt, gpus=[0, 0])
    assert [bound(machine.bind(rank, 2, f"--cpu={option}")[0]) for rank in range(2)] == expected


def test_shares_that_do_not_divide_leave_no_core_out(tmp_path):
    machine = Machine(tmp_path, nodes=1, cores=7, smt=1, gpus=[0, 0, 0])
    assert [bound(machine.bind(rank, 3, "--cpu=exclusive")[0]) for rank in range(3)] == [
        {0, 1},
        {2, 3},
        {4, 5, 6},
    ]


def test_only_cpus_that_the_process_may_use_are_given_out(tmp_path):
    machine = Machine(tmp_path, nodes=4, cores=4, smt=1, gpus=[3, 1], allowed="2-6")
    output, said = machine.bind(1, 2)
    assert bound(output) == {4, 5, 6} and "NUMA node 1" in said
    assert bound(machine.bind(0, 2)[0]) == {2, 3}, (
        "its GPU's node is closed to it: the nodes are shared out in turn"
    )


def test_fewer_gpus_than_nodes_and_a_gpu_that_does_not_say_where_it_is(tmp_path):
    machine = Machine(tmp_path, nodes=8, cores=2, smt=1, gpus=[5, 2, -1, 7])
    assert [bound(machine.bind(rank, 4, "--cpu=exclusive")[0]) for rank in range(4)] == [
        {10, 11},
        {4, 5},
        {8, 9},
        {14, 15},
    ]


def test_more_ranks_than_cores_share(tmp_path):
    machine = Machine(tmp_path, nodes=1, cores=2, smt=1, gpus=[])
    output, said = machine.bind(2, 3, "--cpu=exclusive")
    assert bound(output) == {0, 1} and "shared" in said


@pytest.mark.parametrize("visible, node", [("2,0", 2), ("GPU-0001,GPU-0000", 1), ("0", 0)])
def test_visible_gpus_are_those_of_the_ranks(tmp_path, visible, node):
    machine = Machine(tmp_path, nodes=4, cores=2, smt=1, gpus=[0, 1, 2, 3])
    assert f"NUMA node {node}," in machine.bind(0, 2, CUDA_VISIBLE_DEVICES=visible)[1]


def test_without_gpus_the_ranks_take_the_nodes_in_turn(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[])
    assert [bound(machine.bind(rank, 4, "--cpu=exclusive")[0]) for rank in range(4)] == [
        {0, 1},
        {2, 3},
        {4, 5},
        {6, 7},
    ]


@pytest.mark.parametrize(
    "variables",
    [
        {"LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
        {"SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"},
        {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "DGXNGPU": "2"},
    ],
)
def test_this_machine_for_real(variables):
    """The command sees the CPUs that bind.sh gave it: all of one node, or half of them."""
    mine = os.sched_getaffinity(0)
    env = {"PATH": os.environ["PATH"], **variables}
    command = ["sh", "-c", "grep Cpus_allowed_list /proc/self/status"]
    done = subprocess.run(
        ["./bind.sh", "--cpu", "exclusive", "--", *command],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env,
    )
    assert done.returncode == 0 and "rank 1 of 2 here" in done.stderr
    given = cpus(done.stdout.split()[1])
    assert given and given <= mine and (len(mine) == 1 or given < mine)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--cpu=some", "true"], "--cpu=some"),
        (["--ib"], "--ib wants a value"),
        ([], "no command"),
        (["--gpu=1", "true"], "--gpu=1"),
        (["--cluster=selene", "true"], "--cluster is not needed"),
    ],
)
def test_a_mistake_in_the_options_is_said(options, words):
    done = subprocess.run(["./bind.sh", *options], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_the_status_of_the_command_is_that_of_bind():
    assert (
        subprocess.run(
            ["./bind.sh", "sh", "-c", "exit 3"], cwd=ROOT, capture_output=True
        ).returncode
        == 3
    )
