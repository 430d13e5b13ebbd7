# SPDX-License-Identifier: Apache-2.0
"""The manifests of k8s/ without a cluster: schemas, names, configurations and images."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from support import kube_api_server as api_server
from support.commands import ROOT
from support.launchers import exported

from mxresnet.config import FIELDS

K8S = ROOT / "k8s"
IMAGES = {
    "mxresnet:gpu": "Dockerfile",
    "mxresnet:cpu": "Dockerfile.cpu",
    "mxresnet:ngc": "Dockerfile.ngc",
}
JOBS = ["mpijob.yaml", "mpijob-multi.yaml", "smoke.yaml"]
LABELS = ["4gpu", "64gpu", "data", "smoke", "volume"]
# Variables that a manifest may set. The configuration sets all others.
ALLOWED = {
    "DGXSYSTEM",
    "DATAROOT",
    "LOGDIR",
    "LAUNCH_WAIT",
    "DGXNGPU",
    "DGXNNODES",
    "SUBMISSION_ORG",
    "JOB_UID",
    "CHECKPOINTS",
}


def documents(name):
    return [document for document in yaml.safe_load_all((K8S / name).read_text()) if document]


def pod_specs():
    """Yield (where, pod spec) of every pod in the manifests."""
    for name in JOBS:
        (job,) = documents(name)
        for role, replica in job["spec"]["mpiReplicaSpecs"].items():
            yield f"{name} {role}", replica["template"]["spec"]
    yield "data.yaml", documents("data.yaml")[0]["spec"]["template"]["spec"]


def an(kind, **more):
    return {"type": kind, **more}


def only(required=(), **properties):
    return an("object", additionalProperties=False, properties=properties, required=list(required))


COUNT, WHOLE = an("integer", minimum=1), an("integer", minimum=0)
REPLICA = only(
    ["template"],
    replicas=COUNT,
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=only(["spec"], metadata=an("object"), spec=an("object")),
)
# Fields that both versions of MPIJob have, and the values that the controllers accept.
MPIJOB = only(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"enum": ["kubeflow.org/v2beta1", "kubeflow.org/v1"]},
    kind={"const": "MPIJob"},
    metadata=only(
        ["name"], name=an("string", pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$"), labels=an("object")
    ),
    spec=only(
        ["mpiReplicaSpecs", "slotsPerWorker"],
        slotsPerWorker=COUNT,
        sshAuthMountPath=an("string"),
        runPolicy=only(
            cleanPodPolicy={"enum": ["None", "Running", "All"]},
            backoffLimit=WHOLE,
            activeDeadlineSeconds=COUNT,
            ttlSecondsAfterFinished=WHOLE,
            suspend=an("boolean"),
            schedulingPolicy=only(
                minAvailable=COUNT, queue=an("string"), priorityClass=an("string")
            ),
        ),
        mpiReplicaSpecs=only(["Launcher", "Worker"], Launcher=REPLICA, Worker=REPLICA),
    ),
)


def overlay(version, folder=K8S):
    kubectl = shutil.which("kubectl") or pytest.skip("kubectl is not installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder / "overlays" / version)], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def check_job(job):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(job, MPIJOB)
    spec = job["spec"]
    workers = spec["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert spec["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1
    assert len(f"{job['metadata']['name']}-worker-{workers - 1}") <= 63


@pytest.mark.parametrize("name", JOBS)
def test_jobs_have_the_fields_and_values_that_operators_accept(name):
    check_job(documents(name)[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda job: job["spec"].update(slotPerWorker=4),
        lambda job: job["spec"]["runPolicy"].update(cleanPodPolicy="Always"),
        lambda job: job["spec"]["mpiReplicaSpecs"]["Worker"].update(replicas=0),
        lambda job: job["metadata"].update(name="Job.1"),
        lambda job: job["spec"]["mpiReplicaSpecs"]["Worker"].update(restartPolicy="Always"),
        lambda job: job["metadata"].update(name="x" * 60),
    ],
)
def test_a_damaged_job_is_refused(damage):
    jsonschema = pytest.importorskip("jsonschema")
    (job,) = documents("mpijob.yaml")
    damage(job)
    with pytest.raises((AssertionError, jsonschema.ValidationError)):
        check_job(job)


@pytest.mark.parametrize("version", ["v1", "v2beta1"])
def test_overlays(version):
    objects = overlay(version)
    assert sorted(one["metadata"]["labels"]["mxresnet/job"] for one in objects) == LABELS
    jobs = [one for one in objects if one["kind"] == "MPIJob"]
    assert len(jobs) == len(JOBS)
    assert all(one in objects for name in ("volume.yaml", "data.yaml") for one in documents(name))
    for job in jobs:
        assert job["apiVersion"] == f"kubeflow.org/{version}"
        check_job(job)
        launcher, worker = (
            job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]
            for role in ("Launcher", "Worker")
        )
        # The launcher reaches workers of v1 through the API, with its account; of v2beta1 by sshd.
        assert (launcher.get("automountServiceAccountToken") is False) == (version == "v2beta1")
        assert ("readinessProbe" in worker["containers"][0]) == (version == "v2beta1")


@pytest.mark.parametrize("version", ["v1", "v2beta1"])
def test_an_overlay_names_the_images_of_every_pod(version, tmp_path):
    folder = shutil.copytree(K8S, tmp_path / "k8s", symlinks=True)
    place = folder / "overlays" / version / "kustomization.yaml"
    place.write_text(
        place.read_text().replace("newName: mxresnet", "newName: registry.example/team/mxresnet")
    )
    images = re.findall(r"image: (.*)", yaml.safe_dump_all(overlay(version, folder)))
    assert len(images) == 2 * len(JOBS) + 1
    assert set(images) == {
        "registry.example/team/mxresnet:cpu",
        "registry.example/team/mxresnet:gpu",
    }


def test_each_step_of_the_readme_applies_one_object_of_an_overlay():
    steps = re.findall(r"kubectl (?:apply|create|delete) -[^`]*", (K8S / "README.md").read_text())
    assert sorted(step.rpartition("=")[2] for step in steps) == LABELS
    assert {step.rpartition("=")[0] for step in steps} == {
        "kubectl apply -k k8s/overlays/v2beta1 -l mxresnet/job"
    }


def test_manifests_outside_base_are_links_into_base():
    for path in (K8S / "base").glob("*.yaml"):
        assert path.name == "kustomization.yaml" or (K8S / path.name).resolve() == path.resolve()


@pytest.mark.parametrize(
    "where, spec", pod_specs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_pod_is_valid(where, spec):
    validate = pytest.importorskip("kubernetes_validate")
    validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec},
        "1.30",
        strict=True,
    )
    mounts = {mount["name"] for mount in spec["containers"][0].get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in spec.get("volumes", [])}
    for kind in ("requests", "limits"):
        for amount in spec["containers"][0]["resources"].get(kind, {}).values():
            assert re.fullmatch(r"\d+(m|[KMGT]i)?", str(amount)), (
                f"{where}: {amount} is no quantity"
            )


def test_a_misspelt_field_of_a_pod_is_refused():
    validate = pytest.importorskip("kubernetes_validate")
    spec = {"containers": [{"name": "x", "image": "y", "volumeMount": []}]}
    with pytest.raises(Exception, match="volumeMount"):
        validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec},
            "1.30",
            strict=True,
        )


@pytest.mark.parametrize("name", ["volume.yaml", "data.yaml"])
def test_other_manifests_are_valid(name):
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(name):
        validate.validate(document, "1.30", strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_the_ranks_of_its_configuration(name):
    (job,) = documents(name)
    spec, replicas = job["spec"], job["spec"]["mpiReplicaSpecs"]
    env = {
        item["name"]: item.get("value")
        for item in replicas["Launcher"]["template"]["spec"]["containers"][0]["env"]
    }
    assert set(env) <= ALLOWED
    config = {
        **exported(env["DGXSYSTEM"]),
        **{key: value for key, value in env.items() if key.startswith("DGXN")},
    }
    assert spec["slotsPerWorker"] == int(config["DGXNGPU"])
    assert replicas["Worker"]["replicas"] == int(config.get("DGXNNODES", 1))
    worker = replicas["Worker"]["template"]["spec"]["containers"][0]
    gpus = worker["resources"]["limits"].get("nvidia.com/gpu")
    assert (
        gpus is None if env["DGXSYSTEM"].startswith("CPU") else int(gpus) == spec["slotsPerWorker"]
    )
    assert spec["runPolicy"]["activeDeadlineSeconds"] >= 60 * int(config.get("WALLTIME", 1)) + int(
        env["LAUNCH_WAIT"]
    )


@pytest.mark.slow
def test_a_real_server_accepts_the_manifests_and_refuses_damaged_ones():
    folder = os.environ.get("API_SERVER") or pytest.skip(
        "API_SERVER does not name a folder that tests/support/kube_api_server.py filled"
    )
    assert not api_server.missing(folder)
    api_server.check(folder)


def test_no_hyperparameter_is_repeated():
    names = {field.metadata["env"] for field in FIELDS.values()} - ALLOWED
    for path in K8S.rglob("*.yaml"):
        variables = set(re.findall(r"name: ([A-Z][A-Z0-9_]+)", path.read_text()))
        assert not variables & names, f"{path} sets {variables & names}"
        assert "--batch-size" not in path.read_text() and "--lr" not in path.read_text()


@pytest.mark.parametrize(
    "where, spec", pod_specs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_images_commands_and_paths_exist(where, spec):
    (container,) = spec["containers"]
    dockerfile = (ROOT / IMAGES[container["image"]]).read_text()
    assert "WORKDIR /workspace/mxresnet" in dockerfile
    if "Worker" in where:
        assert (
            "command" not in container and "openssh-server" in dockerfile
        )  # the operator's: /usr/sbin/sshd -De
    else:
        assert (ROOT / container["command"][0]).stat().st_mode & 0o111
    claims = {claim["metadata"]["name"] for claim in documents("volume.yaml")}
    for volume in spec.get("volumes", []):
        assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
    if "Worker" in where and "smoke" not in where:
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert set(mounts) == {"/dev/shm", "/data", "/results"} and mounts["/data"]["readOnly"]
        filled = documents("data.yaml")[0]["spec"]["template"]["spec"]["containers"][0]["command"][
            2
        ]
        assert filled == f"/data/{mounts['/data']['subPath']}"


@pytest.mark.parametrize(
    "where, spec", pod_specs(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_pod_needs_no_root(where, spec):
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    # Who writes to a volume belongs to its group.
    writes = any(not mount.get("readOnly") for mount in container.get("volumeMounts", []))
    claims = any("persistentVolumeClaim" in volume for volume in spec.get("volumes", []))
    assert (spec.get("securityContext", {}).get("fsGroup") == 1000) == (writes and claims)


@pytest.mark.parametrize("name", JOBS)
def test_sshd_is_where_the_jobs_expect_it(name):
    (port,) = re.findall(r"^Port (\d+)$", (K8S / "image" / "sshd_config").read_text(), re.M)
    assert f"    Port {port}\n" in (K8S / "image" / "ssh_config").read_text()
    (job,) = documents(name)
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert worker["readinessProbe"]["tcpSocket"]["port"] == int(port)
    dockerfile = (ROOT / IMAGES[worker["image"]]).read_text()
    (user,) = re.findall(r"useradd --create-home .* (\w+)$", dockerfile, re.M)
    assert job["spec"]["sshAuthMountPath"] == f"/home/{user}/.ssh"


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\bk8s/[\w./-]+", (K8S / "README.md").read_text()):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_shell_of_this_folder_passes_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin"
    ) or pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        [shellcheck, "-x", *map(str, K8S.glob("*.sh"))], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout
