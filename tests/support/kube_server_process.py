# SPDX-License-Identifier: Apache-2.0
"""A kube-apiserver with its etcd, run for the time of a test."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time

import yaml


def free_ports(count):
    """Return some ports that no process listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """An empty etcd and a kube-apiserver, as a context manager."""

    def __init__(self, folder):
        self.folder, self.state, self.started = folder, folder / "state", []

    def __enter__(self):
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir()
        store, peers, port = free_ports(3)
        self.kubectl_flags = [
            f"--server=https://127.0.0.1:{port}",
            "--insecure-skip-tls-verify",
            "--token=secret",
            f"--cache-dir={self.state}/cache",
        ]
        url = f"http://127.0.0.1:{store}"
        key = ["openssl", "genrsa", "-out", self.state / "key", "2048"]
        subprocess.run(key, check=True, stderr=subprocess.DEVNULL)
        (self.state / "tokens").write_text('secret,admin,admin,"system:masters"\n')
        try:
            self._start(
                "etcd",
                f"--data-dir={self.state}/data",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls=http://127.0.0.1:{peers}",
            )
            # Without controllers there are no service accounts: accept pods without them.
            self._start(
                "kube-apiserver",
                f"--etcd-servers={url}",
                f"--cert-dir={self.state}/certificates",
                f"--secure-port={port}",
                "--bind-address=127.0.0.1",
                "--service-cluster-ip-range=10.96.0.0/24",
                "--service-account-issuer=https://localhost",
                f"--service-account-signing-key-file={self.state}/key",
                f"--service-account-key-file={self.state}/key",
                f"--token-auth-file={self.state}/tokens",
                "--authorization-mode=AlwaysAllow",
                "--disable-admission-plugins=ServiceAccount",
            )
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, name, *flags):
        with open(self.state / f"{name}.log", "w") as log:
            self.started.append(
                subprocess.Popen(
                    [self.folder / name, *flags], stdout=log, stderr=log, cwd=self.state
                )
            )

    def _wait(self):
        end = time.monotonic() + 120
        while self.kubectl("get", "--raw", "/readyz").returncode:
            for process in self.started:
                assert process.poll() is None and time.monotonic() < end, (
                    f"{process.args[0]} does not run: see {self.state}"
                )
            time.sleep(0.5)

    def kubectl(self, *arguments, stdin=None):
        env = {**os.environ, "KUBECONFIG": "/dev/null"}
        return subprocess.run(
            ["kubectl", *self.kubectl_flags, *map(str, arguments)],
            input=stdin,
            text=True,
            capture_output=True,
            env=env,
        )

    def must(self, *arguments):
        done = self.kubectl(*arguments)
        assert done.returncode == 0, f"kubectl {arguments}: {done.stderr}"
        return done.stdout

    def define(self, version):
        """Define MPIJobs of this version and of no other."""
        self.must("delete", "crd", "--all", "--wait")
        # create and not apply, which would copy the definition to an annotation of limited size.
        # Not validated, because 1.20 does not support the CEL rules in it.
        self.must("create", "--validate=false", "-f", self.folder / f"{version}.yaml")
        end = time.monotonic() + 60
        # Repeated, because kubectl wait fails at once on a definition without conditions.
        while self.kubectl(
            "wait", "--for=condition=Established", "crd/mpijobs.kubeflow.org", "--timeout=60s"
        ).returncode:
            assert time.monotonic() < end, f"the server refuses the definition of {version}"
            time.sleep(0.5)
        # The schema by which kubectl finds unknown fields is published a little later.
        while (
            f"org.kubeflow.{version}.MPIJob"
            not in json.loads(self.must("get", "--raw", "/openapi/v2"))["definitions"]
        ):
            assert time.monotonic() < end, f"the server has no schema of {version}"
            time.sleep(0.5)
        shutil.rmtree(self.state / "cache", ignore_errors=True)

    def dry_run(self, document):
        return self.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(document))

    def __exit__(self, *_):
        for process in reversed(self.started):
            process.terminate()
            process.wait()
