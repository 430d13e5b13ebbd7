# SPDX-License-Identifier: Apache-2.0
"""Links in Markdown files, and files and modules that any text of the project refers to, exist."""

import re

import pytest
from support.commands import ROOT

FOLDERS = (".github", "benchmarks", "docs", "k8s", "mxresnet", "prepare", "tests")
SUFFIXES = {".cc", ".h", ".md", ".py", ".sh", ".sub", ".toml", ".yaml", ".yml", ""}
# [text](target), not within `code`.
LINK = re.compile(r"(?<!`)\[[^\]`]+\]\(([^()\s]+)\)")
# A path into one of the project's folders: with a suffix, so that it is not an arbitrary word.
PATH = re.compile(
    r"(?<![\w./$}-])(?:\./)?"
    r"((?:benchmarks|docs|k8s|mxresnet|prepare|tests)/[\w./-]*\.(?:cc|h|json|md|py|sh|yaml))\b"
)
# `path` in a Markdown file: a folder too.
QUOTED_PATH = re.compile(r"`((?:benchmarks|docs|k8s|mxresnet|prepare|tests)/[\w./-]*)`")
MODULE = re.compile(r"-m (?P<name>(?:mxresnet|prepare)(?:\.\w+)*)\b")


def text_files():
    """Return the project's own text files."""
    found = [path for path in ROOT.iterdir() if path.name != "LICENSE"]
    for folder in FOLDERS:
        found += (ROOT / folder).rglob("*")
    return sorted(
        path
        for path in found
        if path.is_file()
        and path.suffix in SUFFIXES
        and not {"__pycache__", "build"} & set(path.relative_to(ROOT).parts)
    )


def anchors(path):
    """Return the anchors that GitHub makes of the headings of a Markdown file."""
    headings = re.findall(r"^#+ +(.*?) *$", path.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-")
        for heading in headings
    }


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [path for path in text_files() if path.suffix == ".md"], ids=relative
)
def test_links_of_a_markdown_file(path):
    for target in LINK.findall(path.read_text()):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{target}: no such file"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("path", text_files(), ids=relative)
def test_files_and_modules_that_a_text_refers_to(path):
    text = path.read_text()
    names = {*PATH.findall(text), *(QUOTED_PATH.findall(text) if path.suffix == ".md" else ())}
    missing = {name for name in names if not (ROOT / name).exists()}
    for name in MODULE.findall(text):
        module = ROOT / name.replace(".", "/")
        if not (module.with_suffix(".py").exists() or (module / "__main__.py").exists()):
            missing.add(name)
    assert not missing
