# SPDX-License-Identifier: Apache-2.0
"""Machines for tests: network namespaces with names, files and variables as mpi-operator sets.

Each machine has its own network, host name, processes, /dev/shm, /etc and /root/.ssh; the rest of
the file system is shared.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

from support.commands import ROOT

JOB = "resnet"
POD_SETUP = """
set -e
hostname "$1"; files=$2; shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs -o mode=755 tmpfs /run
for folder in /etc /usr/sbin /usr/lib/openssh; do
    own=/run/own$folder work=/run/work$folder; mkdir -p "$own" "$work"
    mount -t overlay overlay -o "lowerdir=$folder,upperdir=$own,workdir=$work" "$folder"
done
# The files of Open MPI in a pod's own /tmp.
ompi=/tmp/ompi.$(hostname).0; mkdir -p "$ompi"; mount -t tmpfs tmpfs "$ompi"
cp "$files/hosts" /etc/hosts; echo "hosts: files" >/etc/nsswitch.conf
# As in the Dockerfiles.
rm -f /etc/ssh/ssh_host_*; mkdir -p /etc/ssh/ssh_config.d /etc/ssh/sshd_config.d
mv /usr/sbin/sshd /usr/lib/openssh/sshd
cp ROOT/k8s/image/ssh_config /etc/ssh/ssh_config.d/mpi.conf
cp ROOT/k8s/image/sshd_config /etc/ssh/sshd_config.d/mpi.conf
cp ROOT/k8s/image/sshd /usr/sbin/sshd
if [ "$POD_USER" = root ]; then
    home=/root
else
    home=/run/home
    sed -i /:x:1000:/d /etc/passwd
    echo "$POD_USER:x:1000:1000::$home:/bin/sh" >>/etc/passwd
    install -d -o 1000 -g 1000 "$home"
fi
mkdir -p "$home/.ssh"; mount -t tmpfs tmpfs "$home/.ssh"
cp "$files"/ssh/* "$home/.ssh"; mount -o remount,ro "$home/.ssh"
[ "$K_MPI_JOB_ROLE" = worker ] || cp -r "$files/mpi" /etc/mpi
[ "$POD_USER" = root ] || set -- setpriv --reuid=1000 --regid=1000 --clear-groups \
    --bounding-set=-all --inh-caps=-all --no-new-privs env HOME="$home" "$@"
exec "$@"
""".replace("ROOT", str(ROOT))
TOOLS = ("ip", "unshare", "setpriv", "ssh", "ssh-keygen", "/usr/sbin/sshd")
PROBE = """
mount -t tmpfs t /mnt && mkdir /mnt/u /mnt/w &&
mount -t overlay o -o lowerdir=/etc,upperdir=/mnt/u,workdir=/mnt/w /etc
"""


def unavailable_reason():
    """Return why such machines cannot be made here, or None."""
    if os.getuid() != 0:
        return "network namespaces need root"
    for tool in TOOLS:
        if not shutil.which(tool):
            return (
                f"{tool} is not installed (apt-get install iproute2 openssh-client openssh-server)"
            )
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "sh", "-c", PROBE],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def run_ip(*arguments):
    subprocess.run(["ip", *map(str, arguments)], check=True)


def _command_line(pid):
    """Return the command line of a process, with a space after each word, or None if it ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return None


def _start_time(pid):
    """Return when a process started, in clock ticks, or None if it ended."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


class Cluster:
    """A launcher and some workers of one MPIJob.

    A context manager: all processes and namespaces end with it. The user is root, or the name of
    one who has number 1000, no capabilities, and the keys as the operator then mounts them: they
    belong to root, and everybody may read them.
    """

    def __init__(self, folder, workers=2, slots=1, user="root"):
        self.folder, self.slots, self.user = pathlib.Path(folder), slots, user
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
        key_type = ["-t", "ecdsa", "-b", "521", "-m", "PEM", "-N", ""]
        subprocess.run(["ssh-keygen", "-q", *key_type, "-f", ssh / "id_rsa"], check=True)
        shutil.copy(ssh / "id_rsa.pub", ssh / "authorized_keys")
        for file in ssh.iterdir():
            file.chmod(0o600 if self.user == "root" else 0o644)
        (mpi / "hostfile").write_text(
            "".join(f"{name}.{JOB}.default.svc slots={self.slots}\n" for name in self.workers)
        )
        lines = ["127.0.0.1 localhost"]
        for i, name in enumerate(self.names):
            service = f"{name}.{JOB}.default.svc"
            lines.append(f"10.77.0.{10 + i} {service}.cluster.local {service} {name}")
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")

    def _make_network(self):
        switch = self._switch
        run_ip("netns", "add", switch)
        run_ip("-n", switch, "link", "add", "br0", "type", "bridge")
        run_ip("-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            space, port = self.namespace(name), f"v{i}"
            run_ip("netns", "add", space)
            end = ["eth0", "netns", space, "type", "veth"]
            run_ip("link", "add", *end, "peer", "name", port, "netns", switch)
            run_ip("-n", switch, "link", "set", port, "master", "br0", "up")
            run_ip("-n", space, "addr", "add", f"10.77.0.{10 + i}/24", "dev", "eth0")
            run_ip("-n", space, "link", "set", "eth0", "up")
            run_ip("-n", space, "link", "set", "lo", "up")
            run_ip("-n", space, "route", "add", "default", "via", "10.77.0.1")

    def _start(self, name, command, env, **options):
        # The processes of a test's machines end with the test, also when it is killed.
        enter = ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace(name)]
        isolate = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        set_up = ["bash", "-c", POD_SETUP, "pod", name, str(self.folder)]
        return subprocess.Popen(
            [*enter, "unshare", *isolate, *set_up, *command],
            env={"HOME": "/root", "POD_USER": self.user, "PATH": os.environ["PATH"], **env},
            cwd=ROOT,
            text=True,
            **options,
        )

    def start_worker(self, name):
        self._pods[name] = self._start(
            name, ["/usr/sbin/sshd", "-De"], {"K_MPI_JOB_ROLE": "worker"}, stderr=subprocess.DEVNULL
        )

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

    def _all_process_ids(self, name):
        """Return the ids of a machine's processes, as seen from outside."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], text=True, capture_output=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def process_ids(self, name, pattern):
        """Return the ids of processes with this in their command lines, oldest first.

        Guards, whose command lines contain those of their commands, are left out unless the pattern
        is empty.
        """
        found = []
        for pid in self._all_process_ids(name):
            command, started = _command_line(pid), _start_time(pid)
            if command is None or started is None or (pattern and "process_guard.py" in command):
                continue
            if pattern in command:
                found.append((started, pid))
        return [pid for _, pid in sorted(found)]  # ids wrap around: a higher one may be older

    def rank_process_ids(self, name):
        """Return the ids of the Python processes of a machine's ranks."""
        return self.process_ids(name, "python -m mxresnet ")

    def remove(self, name):
        """End everything on a machine at once, as when its pod is deleted or its power fails."""
        for _ in range(10):  # a process that was being started may not have been in the namespace
            for pid in self._all_process_ids(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if name in self._pods:
                self._pods[name].kill()
            time.sleep(0.1)

    def cut_link(self, name):
        """Disconnect a machine from the network. Its peers are not notified."""
        self._set_link(name, "down")

    def restore_link(self, name):
        """Connect a machine to the network again."""
        self._set_link(name, "up")

    def _set_link(self, name, state):
        run_ip("-n", self._switch, "link", "set", f"v{self.names.index(name)}", state)

    def remaining_processes(self):
        """Return {id: command} of all machines' processes, except sshd and those of the fixture."""
        found = {}
        for name in self.names:
            for pid in self._all_process_ids(name):
                command = _command_line(pid)
                if command and not command.startswith(("/usr/sbin/sshd -De", "sshd: ", "unshare ")):
                    found[pid] = f"{name}: {command}"
        return found

    def wait_until_idle(self, seconds, ignored=()):
        """Wait until no process remains, at most this long.

        Args:
            seconds: Time limit.
            ignored: Machines whose processes are not counted, because nothing can end them.

        Returns:
            The processes that remain, by id.
        """
        end = time.monotonic() + seconds
        while True:
            remaining = {
                pid: command
                for pid, command in self.remaining_processes().items()
                if not command.startswith(tuple(ignored))
            }
            if not remaining or time.monotonic() > end:
                return remaining
            time.sleep(0.2)

    def __exit__(self, *_):
        for name in self.names:
            self.remove(name)
        for pod in self._pods.values():
            pod.kill()
            pod.wait()
        for space in [*map(self.namespace, self.names), self._switch]:
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL)
