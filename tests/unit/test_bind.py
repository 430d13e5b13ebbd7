# SPDX-License-Identifier: Apache-2.0
"""bind.sh on fake machines of several shapes: files in place of /proc and /sys, fake tools."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program

from mxresnet.errors import UserError
from mxresnet.launch.bind import bound_command, find_local_rank

TOOLS = ("bash", "env", "dirname", "true", "uname")  # and Python
# A DGX A100 as NVIDIA documents it: 8 NUMA nodes of 16 cores, the GPUs in pairs on four of them.
DGX_NODES = [3, 3, 1, 1, 7, 7, 5, 5]


class Machine:
    """A fake machine: NUMA nodes of cores, with GPUs and adapters on some of them.

    The second hardware threads of all cores are numbered after the first ones.
    """

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
        os.symlink(sys.executable, self.path / "python3")
        for binder in binders:
            fake_program(self.path, binder, f'echo {binder} "$@"\n')
        rows = [self.add_gpu(index, node) for index, node in enumerate(gpus)]
        if rows:
            fake_program(self.path, "nvidia-smi", "".join(f"echo '{row}'\n" for row in rows))

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
        """Return the standard output of the command of a rank, and the report of bind.sh."""
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


def test_each_rank_of_a_dgx_gets_its_share_of_the_node_of_its_gpu(dgx):
    given = []
    for rank, node in enumerate(DGX_NODES):
        output, report = dgx.bind(rank, 8, "--cpu=exclusive")
        assert output.startswith("numactl ") and f"--preferred={node} env" in output
        mine = bound(output)
        assert mine <= set(range(16 * node, 16 * node + 16)) | set(
            range(128 + 16 * node, 144 + 16 * node)
        )
        assert {cpu ^ 128 for cpu in mine} == mine and len(mine) == 16, (
            "8 cores with their hyper-threads"
        )
        given += mine
        assert f"GPU 0000:{16 * rank + 7:02x}:00.0" in report and f"NUMA node {node}" in report
    assert len(given) == len(set(given)) == 128


def test_a_rank_that_sees_only_its_own_gpu_is_bound_near_it(dgx):
    """As under Slurm with --gpus-per-task=1: nvidia-smi lists one GPU, with number 0."""
    given = []
    for rank, node in enumerate(DGX_NODES):
        bus = f"00000000:{16 * rank + 7:02X}:00.0"
        fake_program(dgx.path, "nvidia-smi", f"echo '0, GPU-{rank:04d}, {bus}'\n")
        output, report = dgx.bind(
            rank, 8, "--cpu=exclusive", "--ib=single", CUDA_VISIBLE_DEVICES="0"
        )
        assert f"NUMA node {node}" in report and f"GPU 0000:{16 * rank + 7:02x}:00.0" in report
        mine = bound(output)
        assert mine <= set(range(16 * node, 16 * node + 16)) | set(
            range(128 + 16 * node, 144 + 16 * node)
        )
        assert len(mine) == 4, "2 of the node's 16 cores: the other 7 ranks may be there too"
        given += mine
    assert len(given) == len(set(given))


def test_each_rank_of_a_dgx_gets_its_own_adapter_near_its_gpu_and_no_storage_port(dgx):
    used = []
    for rank in range(8):
        _, report = dgx.bind(rank, 8, "--cpu=off", "--mem=off", "--ib=single")
        used.append(report.split("adapter ")[1].strip())
    assert used == [f"mlx5_{n}" for n in (0, 1, 2, 3, 6, 7, 8, 9)]
    output, report = dgx.bind(0, 8, "--cpu=off", "--mem=off", "--ib=single")
    assert (
        "UCX_NET_DEVICES=mlx5_0:1" in output.split()
        and "CUDA_DEVICE_ORDER=PCI_BUS_ID" in output.split()
    )
    output, report = dgx.bind(
        0, 8, "--cpu=off", "--mem=off", "--ib=single", UCX_NET_DEVICES="mine:1"
    )
    assert "UCX_NET_DEVICES=mine:1" in output.split() and "adapter" not in report


def test_an_adapter_that_is_down_is_not_used(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1])
    machine.add_adapter("mlx5_0", 0, 0, state="1: DOWN")
    machine.add_adapter("mlx5_1", 1, 8)
    for rank in range(2):
        assert "adapter mlx5_1," in machine.bind(rank, 2, "--ib=single")[1]


@pytest.mark.parametrize("binders, begins", [(("taskset",), "taskset -c 4-7 "), ((), "OMPI")])
def test_a_missing_numactl_or_taskset_is_reported(tmp_path, binders, begins):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1], binders=binders)
    output, report = machine.bind(1, 2, command=("env",))
    assert (
        begins in output
        and "memory not bound" in report
        and ("NOT bound" in report) == (not binders)
    )


def test_a_forbidden_numactl_is_not_used(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1])
    fake_program(
        machine.path, "numactl", "echo 'set_mempolicy: Operation not permitted' >&2; exit 1\n"
    )
    assert machine.bind(1, 2)[0] == "taskset -c 4-7 env"


@pytest.mark.parametrize(
    "smt, option, expected",
    [
        (1, "exclusive", [{0, 1}, {2, 3}]),
        (2, "exclusive", [{0, 1, 4, 5}, {2, 3, 6, 7}]),
        (2, "exclusive,nosmt", [{0, 1}, {2, 3}]),
    ],
)
def test_exclusive_cores_with_hyper_threads(tmp_path, smt, option, expected):
    machine = Machine(tmp_path, nodes=1, cores=4, smt=smt, gpus=[0, 0])
    assert [bound(machine.bind(rank, 2, f"--cpu={option}")[0]) for rank in range(2)] == expected


def test_uneven_shares_use_every_core(tmp_path):
    machine = Machine(tmp_path, nodes=1, cores=7, smt=1, gpus=[0, 0, 0])
    assert [bound(machine.bind(rank, 3, "--cpu=exclusive")[0]) for rank in range(3)] == [
        {0, 1},
        {2, 3},
        {4, 5, 6},
    ]


def test_only_allowed_cpus_are_used(tmp_path):
    machine = Machine(tmp_path, nodes=4, cores=4, smt=1, gpus=[3, 1], allowed="2-6")
    output, report = machine.bind(1, 2)
    assert bound(output) == {4, 5, 6} and "NUMA node 1" in report
    assert bound(machine.bind(0, 2)[0]) == {2, 3}, (
        "this process may use no CPU of its GPU's node: it gets one of the nodes in turn"
    )


def test_a_gpu_without_a_known_node_gets_one_of_the_nodes(tmp_path):
    machine = Machine(tmp_path, nodes=8, cores=2, smt=1, gpus=[5, 2, -1, 7])
    assert [bound(machine.bind(rank, 4, "--cpu=exclusive")[0]) for rank in range(4)] == [
        {10, 11},
        {4, 5},
        {8, 9},
        {14, 15},
    ]


def test_more_ranks_than_cores_share_the_cores(tmp_path):
    machine = Machine(tmp_path, nodes=1, cores=2, smt=1, gpus=[])
    output, report = machine.bind(2, 3, "--cpu=exclusive")
    assert bound(output) == {0, 1} and "shared" in report


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
def test_the_command_is_bound_on_this_machine(variables):
    """The command may use the CPUs that bind.sh chose: half of those of a node."""
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
    "options, message",
    [
        (["--cpu=some", "true"], "--cpu=some"),
        (["--ib"], "--ib needs a value"),
        ([], "no command"),
        (["--gpu=1", "true"], "--gpu=1"),
        (["--cluster=selene", "true"], "--cluster is not needed"),
    ],
)
def test_a_wrong_option_is_a_user_error(options, message):
    done = subprocess.run(["./bind.sh", *options], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("LOCAL_RANK", "-1", "is not a rank"),
        ("SLURM_LOCALID", "999999", "is not a rank"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "1000000000", "is not a number of ranks"),
        ("SLURM_STEP_TASKS_PER_NODE", "99999999999999999999(x4)", "is not a number of ranks"),
        ("DGXNGPU", "many", "is not a number of ranks"),
    ],
)
def test_a_number_of_ranks_that_is_none_is_a_user_error(name, value, words):
    with pytest.raises(UserError, match=f"^{name}={re.escape(value)} {words}"):
        find_local_rank({name: value})


@pytest.mark.parametrize("value", ["8", "8(x4)", "8,6", "8(x2),6"])
def test_slurms_number_of_ranks_on_each_machine_is_read(value):
    assert find_local_rank({"SLURM_STEP_TASKS_PER_NODE": value}).size == 8


def test_the_exit_status_is_that_of_the_command():
    assert (
        subprocess.run(
            ["./bind.sh", "sh", "-c", "exit 3"], cwd=ROOT, capture_output=True
        ).returncode
        == 3
    )


def test_the_command_keeps_working_directory_environment_and_signals(tmp_path):
    """The launcher in Python does not change what the command inherits from its caller."""
    (tmp_path / "json.py").write_text("raise RuntimeError('imported from the working directory')")
    script = 'pwd; echo "${PYTHONPATH-unset}"; grep SigIgn /proc/self/status'
    for python_path in ({}, {"PYTHONPATH": "/some/where"}):
        done = subprocess.run(
            [ROOT / "bind.sh", "sh", "-c", script],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], **python_path},
            text=True,
            capture_output=True,
        )
        folder, path, ignored = done.stdout.splitlines()
        assert (folder, path) == (str(tmp_path), python_path.get("PYTHONPATH", "unset"))
        assert int(ignored.split()[1], 16) & 1 << (signal.SIGPIPE - 1) == 0


@pytest.mark.parametrize("name, status", [("no-such-command", 127), ("/proc/version", 126)])
def test_a_command_that_cannot_be_run_ends_as_in_a_shell(name, status):
    command = ["./bind.sh", "--cpu=off", "--mem=off", name]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == status
    assert f"bind.sh: {name} cannot be started" in done.stderr


def test_a_launcher_in_python_gets_the_bound_command(tmp_path):
    machine = Machine(tmp_path, nodes=2, cores=4, smt=1, gpus=[0, 1])
    environ = {"PATH": str(machine.path), "BIND_ROOT": str(machine.root), "LOCAL_RANK": "1"}
    command, bound_environ = bound_command(["--cpu=node"], ["train"], environ)
    assert command == ["numactl", "--physcpubind=4-7", "--preferred=1", "train"]
    assert bound_environ == {**environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with pytest.raises(UserError, match="--gpu=1 is not an option"):
        bound_command(["--gpu=1"], ["train"], environ)
