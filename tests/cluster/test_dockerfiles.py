# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles without a container engine: files that they copy exist, packages are pinned."""

import pathlib
import re

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
def test_installed_packages_are_pinned(dockerfile):
    text = (ROOT / dockerfile).read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    for base in re.findall(r"^FROM (\S+)", text, re.M):
        assert ":" in base and not base.endswith(":latest")
    for command in re.findall(r"pip install ([^&\n]*)", text):
        words = [
            word
            for word in command.split()
            if not word.startswith(("-", "'.", ".", "\\")) and word != "constraints.txt"
        ]
        assert all("==" in word or word in pinned for word in words), command
        assert "-c constraints.txt" in command or "--no-deps" in command
