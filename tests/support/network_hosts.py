# SPDX-License-Identifier: Apache-2.0
"""Machines for tests: network namespaces with names, files and variables as mpi-operator (v2beta1) gives them to pods.

Each has its own network, host name, processes, /dev/shm, /etc and /root/.ssh, and shares the rest of the file system.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import time

from support.commands import ROOT

JOB = "resnet"
IN_POD = """
set -e
hostname "$1"; folder=$2; shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run; mkdir /run/sshd /run/etc
mount -t tmpfs tmpfs /run/etc; mkdir /run/etc/new /run/etc/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/new,workdir=/run/etc/work /etc
ompi=/tmp/ompi.$(hostname).0; mkdir -p "$ompi"; mount -t tmpfs tmpfs "$ompi"  # what Open MPI keeps in a pod's own /tmp
cp "$folder/hosts" /etc/hosts; echo "hosts: files" >/etc/nsswitch.conf
mkdir -p /etc/ssh/ssh_config.d /etc/ssh/sshd_config.d
cp ROOT/k8s/image/ssh_config /etc/ssh/ssh_config.d/mpi.conf; cp ROOT/k8s/image/sshd_config /etc/ssh/sshd_config.d/mpi.conf
ls /etc/ssh/ssh_host_*_key >/dev/null 2>&1 || ssh-keygen -q -A
mkdir -p /root/.ssh; mount -t tmpfs tmpfs /root/.ssh; cp "$folder"/ssh/* /root/.ssh; mount -o remount,ro /root/.ssh
[ "$K_MPI_JOB_ROLE" = worker ] || cp -r "$folder/mpi" /etc/mpi
exec "$@"
""".replace("ROOT", str(ROOT))


def why_not():
    """Return why no such machines can be made here, or None."""
    if os.getuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", "setpriv", "ssh", "ssh-keygen", "/usr/sbin/sshd"):
        if not shutil.which(tool):
            return (
                f"{tool} is not installed (apt-get install iproute2 openssh-client openssh-server)"
            )
    probe = "mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w && mount -t overlay o -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", probe],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True)


class Cluster:
    """A launcher and some workers of one MPIJob. Use as a context manager: all processes and namespaces end with it."""

    def __init__(self, folder, workers=2, slots=1):
        self.folder, self.slots = pathlib.Path(folder), slots
        self.workers = [f"{JOB}-worker-{i}" for i in range(workers)]
        self.names = [f"{JOB}-launcher", *self.workers]
        self._prefix = f"mx{os.getpid()}"
        self._switch = f"{self._prefix}sw"
        self._pods = {}

    def namespace(self, name):
        return f"{self._prefix}{name}"

    def __enter__(self):
        try:
            self._write_files()
            self._make_network()
            for name in self.workers:
                self.start_worker(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _write_files(self):
        ssh, mpi = self.folder / "ssh", self.folder / "mpi"
        ssh.mkdir()
        mpi.mkdir()
        subprocess.run(
            [
                "ssh-keygen",
                "-q",
                "-t",
                "ecdsa",
                "-b",
                "521",
                "-m",
                "PEM",
                "-N",
                "",
                "-f",
                ssh / "id_rsa",
            ],
            check=True,
        )
        shutil.copy(ssh / "id_rsa.pub", ssh / "authorized_keys")
        for file in ssh.iterdir():
            file.chmod(0o600)
        (mpi / "hostfile").write_text(
            "".join(f"{name}.{JOB}.default.svc slots={self.slots}\n" for name in self.workers)
        )
        lines = ["127.0.0.1 localhost"]
        for i, name in enumerate(self.names):
            lines.append(
                f"10.77.0.{10 + i} {name}.{JOB}.default.svc.cluster.local {name}.{JOB}.default.svc {name}"
            )
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def _make_network(self):
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            space = self.namespace(name)
            ip("netns", "add", space)
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                space,
                "type",
                "veth",
                "peer",
                "name",
                f"v{i}",
                "netns",
                self._switch,
            )
            ip("-n", self._switch, "link", "set", f"v{i}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{10 + i}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "route", "add", "default", "via", "10.77.0.1")

    def _start(self, name, command, env, **options):
        return subprocess.Popen(
            # A test that is killed takes its machines along.
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "ip",
                "netns",
                "exec",
                self.namespace(name),
                "unshare",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                IN_POD,
                "pod",
                name,
                str(self.folder),
                *command,
            ],
            env={"HOME": "/root", "PATH": os.environ["PATH"], **env},
            cwd=ROOT,
            text=True,
            **options,
        )

    def start_worker(self, name):
        pod = self._start(
            name, ["/usr/sbin/sshd", "-De"], {"K_MPI_JOB_ROLE": "worker"}, stderr=subprocess.DEVNULL
        )
        self._pods[name] = pod

    def launch(self, command, env=None, **options):
        """Start the launcher's command with the operator's variables; return its process."""
        injected = {
            "K_MPI_JOB_ROLE": "launcher",
            "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
            "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
            "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
            "OMPI_MCA_orte_set_default_slots": str(self.slots),
            "NVIDIA_VISIBLE_DEVICES": "",
            "NVIDIA_DRIVER_CAPABILITIES": "",
        }
        pod = self._start(self.names[0], command, {**injected, **(env or {})}, **options)
        self._pods[self.names[0]] = pod
        return pod

    def inside(self, name, pattern):
        """Process ids (as seen from outside) in a machine whose command line contains the pattern, oldest first."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], text=True, capture_output=True
        ).stdout.split()
        found = []
        for pid in map(int, pids):
            try:
                command = (
                    pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                )
                started = int(
                    pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
                )
            except OSError:
                continue
            if pattern in command:
                found.append((started, pid))
        return [pid for _, pid in sorted(found)]  # ids start from the beginning again now and then

    def ranks(self, name):
        """The Python processes of a machine's ranks."""
        return self.inside(name, "python -m mxresnet") or self.inside(name, "/fault.py")

    def remove(self, name):
        """End everything on a machine at once, as when its pod is deleted or its power fails."""
        for _ in range(10):  # what was just being started may not have been in the namespace yet
            for pid in subprocess.run(
                ["ip", "netns", "pids", self.namespace(name)], text=True, capture_output=True
            ).stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if name in self._pods:
                self._pods[name].kill()
            time.sleep(0.1)

    def cut(self, name):
        """Take away a machine's network, without a word to anybody."""
        ip("-n", self._switch, "link", "set", f"v{self.names.index(name)}", "down")

    def mend(self, name):
        ip("-n", self._switch, "link", "set", f"v{self.names.index(name)}", "up")

    def left(self):
        """What runs on all machines, but for sshd and the pods' own processes."""
        found = {}
        for name in self.names:
            for pid in self.inside(name, ""):
                try:
                    command = (
                        pathlib.Path(f"/proc/{pid}/cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode()
                    )
                except OSError:
                    continue
                if command and not command.startswith(("/usr/sbin/sshd -De", "sshd: ", "unshare ")):
                    found[pid] = f"{name}: {command}"
        return found

    def wait_until_nothing_is_left(self, seconds, but=()):
        """Return what is left after at most so many seconds: {} when nothing is. But for machines where nobody can end anything."""
        end = time.monotonic() + seconds
        while True:
            left = {pid: what for pid, what in self.left().items() if not what.startswith(but)}
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.2)

    def __exit__(self, *_):
        for name in self.names:
            self.remove(name)
        for pod in self._pods.values():
            pod.kill()
            pod.wait()
        for space in [*map(self.namespace, self.names), self._switch]:
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)
