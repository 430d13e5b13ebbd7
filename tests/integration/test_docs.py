# SPDX-License-Identifier: Apache-2.0
"""Every command of the pages is run here, run by another test, or marked with the reason why not.

The line before a block of shell commands is one of

    <!-- run -->                     the block is run here, on a small data set
    <!-- run by: tests/... -->       that file or folder runs it
    <!-- not run: reason -->
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```sh\n(?P<code>.*?)^```", re.M | re.S)
README_WORDS = 1500


def blocks():
    """Yield (page, mark, commands) of each block of shell commands."""
    for page in PAGES:
        for found in BLOCK.finditer(page.read_text()):
            yield page.relative_to(ROOT), found["mark"], found["code"]


def runnable():
    for page, mark, code in blocks():
        if mark == "run":
            yield pytest.param(code, id=f"{page}: {code.splitlines()[0]}")


def test_every_block_is_marked():
    for page, mark, code in blocks():
        assert mark, f"{page}: no mark before the block {code!r}"
        kind, _, rest = mark.partition(":")
        assert kind in ("run", "run by", "not run"), f"{page}: unknown mark {mark!r}"
        if kind == "run by":
            assert (ROOT / rest.strip()).exists(), f"{page}: {rest.strip()} does not exist"
        assert kind == "run" or rest.strip(), f"{page}: {mark!r} gives no reason"


@pytest.fixture(scope="module")
def machine(few, tmp_path_factory):
    """A folder with a source and a converted data set under the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(few.parent / "images", folder / "imagenet")
    return folder


@pytest.mark.parametrize("commands", runnable())
def test_commands_of_the_pages(commands, machine):
    commands = re.sub("/pvc|/tmp", str(machine), commands)
    environ = {
        **os.environ,
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=ROOT,
        env=environ,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    words = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text()).split()
    assert len(words) <= README_WORDS
