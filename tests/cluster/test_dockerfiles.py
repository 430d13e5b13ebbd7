# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles without a container engine: files that they copy exist, packages are pinned."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT

DOCKERFILES = ["Dockerfile", "Dockerfile.cpu", "Dockerfile.ngc"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_copied_files_exist_and_are_in_the_build_context(dockerfile):
    context = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for line in re.findall(r"^COPY (?!--from)(.*)", (ROOT / dockerfile).read_text(), re.M):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), f"{dockerfile}: {source}"
            assert source == "." or any(
                pathlib.PurePath(source).match(f"{pattern}*") or source.startswith(f"{pattern}/")
                for pattern in context
            )


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_base_images_can_be_given_by_digest(dockerfile):
    text = (ROOT / dockerfile).read_text()
    defaults = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, re.M))
    used = re.findall(r"^FROM \$\{(\w+)\}( AS build)?$", text, re.M)
    assert {name for name, _ in used} == set(defaults)
    assert len(used) == len(re.findall(r"^FROM ", text, re.M))
    for image in defaults.values():
        assert ":" in image and not image.endswith(":latest")


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_hadolint(dockerfile):
    hadolint = shutil.which("hadolint", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, ROOT / dockerfile], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_nothing_in_an_image_needs_root(dockerfile):
    """Numbers, because Kubernetes compares them with runAsNonRoot."""
    last = (ROOT / dockerfile).read_text().rpartition("FROM ")[2]
    assert last.splitlines()[-2] == "USER 1000:1000"
    assert "useradd --create-home --uid 1000 " in last


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_downloaded_packages_have_hashes(dockerfile):
    text = re.sub(r"\\\n\s*", " ", (ROOT / dockerfile).read_text())
    commands = re.findall(r"pip install ([^&\n]*)", text)
    for command in commands:
        assert "--no-index" in command or (
            "--require-hashes" in command
            and (ROOT / command.rpartition("-r ")[2].split()[0]).exists()
        ), command
    # The others install with setup_env.sh.
    assert bool(commands) == (dockerfile == "Dockerfile.ngc")


def test_the_gpu_image_names_the_driver_that_it_needs():
    """NVIDIA's container runtime compares it with the driver: CUDA 11.0 came with 450."""
    text = (ROOT / "Dockerfile").read_text().rpartition("FROM ")[2]
    assert "\nENV NVIDIA_REQUIRE_CUDA=cuda>=11.0\n" in text
    assert "\nENV NVIDIA_VISIBLE_DEVICES=all\n" in text


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.ngc"])
def test_gpu_images_may_use_the_jpeg_decoder(dockerfile):
    text = (ROOT / dockerfile).read_text()
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video\n" in text.rpartition("FROM ")[2]


def test_asynchronous_completion_has_what_it_needs():
    text = (ROOT / "Dockerfile.ngc").read_text()
    assert ("HOROVOD_ENABLE_ASYNC_COMPLETION=1" in text) == ("MXNET_ASYNC_GPU_ENGINE=1" in text)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_images_have_standard_labels(dockerfile):
    labels = re.findall(
        r'org\.opencontainers\.image\.(\w+)="[^"]+"', (ROOT / dockerfile).read_text()
    )
    assert labels == ["title", "description", "licenses"]
