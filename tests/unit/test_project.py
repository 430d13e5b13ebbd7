# SPDX-License-Identifier: Apache-2.0
"""Rules for the source files: allowed imports, sizes, references, shell options."""

import ast
import os
import subprocess
import sys

import pytest
from support.allowed_imports import EDGES, OWNERS
from support.commands import ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_COLUMNS = 100


def files(*patterns):
    """Return the project's files that match, sorted; build products are left out."""
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in found if "build" not in path.relative_to(ROOT).parts)


def relative(path):
    return str(path.relative_to(ROOT))


MODULES = files("mxresnet/**/*.py", "prepare/**/*.py")
PYTHON_FILES = sorted([*MODULES, *files("setup.py", "tests/**/*.py", "benchmarks/**/*.py")])
SHELL_FILES = files(
    *("*.sh", "run.sub", ".ci/*", "k8s/**/*.sh", "k8s/image/sshd", "mxresnet/**/*.sh")
)
SOURCE_FILES = sorted(
    [*PYTHON_FILES, *SHELL_FILES, *files("mxresnet/**/*.h", "mxresnet/**/*.cc", "tests/**/*.cc")]
)


def module_name(path):
    """Return the dotted name of a file below its top-level package."""
    return ".".join(path.with_suffix("").relative_to(ROOT).parts[1:])


def is_module(name):
    """Return whether a dotted name is a module or a package of this project."""
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports(path):
    """Yield what a file imports as dotted names, those of the project down to the module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if is_module(name) else node.module


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports(path):
    package = path.relative_to(ROOT).parts[0]
    module = module_name(path)
    for name in imports(path):
        top, _, rest = name.partition(".")
        if package == "prepare":
            assert top not in ("mxresnet", "mxnet", "horovod"), f"{path} imports {name}"
        else:
            assert top != "prepare", f"{path} imports {name}"
            assert top not in OWNERS or module in OWNERS[top], f"{path} imports {name}"
            assert top != "mxresnet" or rest in EDGES.get(module, ()), f"{path} imports {name}"


def importable_modules(folder):
    """Return the full names of the modules in a folder of mxresnet, except scripts."""
    return [
        "mxresnet." + module_name(path)
        for path in files(f"mxresnet/{folder}/**/*.py")
        if path.stem not in ("__init__", "__main__")
    ]


def import_modules(modules, before="", options=()):
    """Import modules in a new Python that first executes the statement `before`."""
    script = (
        f"import importlib, sys\n{before}\nfor name in sys.argv[1:]: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, *options, "-c", script, *modules], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_launch_imports_only_the_standard_library():
    """Launchers also run where the environment is not installed, on any Python 3.8 or newer."""
    # -S: without site-packages.
    import_modules(importable_modules("launch"), options=("-E", "-S"))


def test_results_imports_no_training_library():
    blocked = ("mxnet", "horovod", "mpi4py", "nvidia")
    import_modules(
        importable_modules("results"), before=f"sys.modules.update(dict.fromkeys({blocked}))"
    )


@pytest.mark.parametrize("path", SOURCE_FILES, ids=relative)
def test_file_size(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    too_long = [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert not too_long, f"lines of more than {MAX_COLUMNS} columns: {too_long}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_function_size_and_python_3_8(path):
    too_long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not too_long, f"functions of more than {MAX_FUNCTION_LINES} lines: {too_long}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_license_line_and_docstring(path):
    text = path.read_text()
    tree = ast.parse(text)
    if tree.body:
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
        assert ast.get_docstring(tree), "no module docstring"


@pytest.mark.parametrize("path", SHELL_FILES, ids=relative)
def test_shell_scripts_stop_at_the_first_error(path):
    if os.access(path, os.X_OK):
        assert "\nset -euo pipefail\n" in path.read_text()
