# SPDX-License-Identifier: Apache-2.0
"""The files in requirements/, from which packages are installed: complete, current, with hashes."""

import re
import runpy

import pytest
import setuptools
from support.commands import ROOT

FILES = sorted((ROOT / "requirements").glob("*.txt"))
EXTRAS_OF_FILE = {
    "build": ["build", "cpu"],
    "cpu": ["cpu", "train-without-horovod", "prepare"],
    "gpu": ["build", "gpu", "train-without-horovod", "prepare"],
    "cuda": ["cuda"],
    "dev": ["test", "lint", "export", "report"],
}
PIN = re.compile(r"([a-z0-9-]+)==([\w.]+)( ; \w+ [<>=!]+ '[\w.*]+')?")


def read_pins(text):
    """Return {(name, version)} of the lines that pin a package."""
    return {match.groups()[:2] for match in re.finditer(rf"^{PIN.pattern}", text, re.M)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_package_has_hashes(path):
    lines = path.read_text().replace("\\\n", "").splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages
    for line in packages:
        pin, *hashes = line.split(" --hash=sha256:")
        assert PIN.fullmatch(pin.strip()), pin
        assert hashes, pin
        assert all(re.fullmatch("[0-9a-f]{64}", digest.strip()) for digest in hashes), pin


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem != "ngc"], ids=lambda path: path.stem
)
def test_versions_are_those_of_the_constraints(path):
    constraints = read_pins((ROOT / "constraints.txt").read_text())
    assert read_pins(path.read_text()) - constraints == set(), "run make lock"


def test_every_package_of_setup_py_is_locked(monkeypatch):
    metadata = {}
    monkeypatch.setattr(setuptools, "setup", metadata.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    extras = metadata["extras_require"]
    for name, names in EXTRAS_OF_FILE.items():
        locked = {pin[0] for pin in read_pins((ROOT / "requirements" / f"{name}.txt").read_text())}
        wanted = {package for extra in names for package in extras[extra]}
        assert wanted - locked == set(), f"requirements/{name}.txt: run make lock"
    assert {extra for names in EXTRAS_OF_FILE.values() for extra in names} | {"train"} == set(
        extras
    )


def test_the_lock_is_for_the_pythons_that_setup_env_accepts():
    (newest,) = re.findall(r"python_version < '3\.(\d+)'", (ROOT / "pyproject.toml").read_text())
    script = (ROOT / "mxresnet" / "launch" / "setup_machine.sh").read_text()
    (accepted,) = re.findall(r"<= sys.version_info\[:2\] <= \(3, (\d+)\)", script)
    assert int(accepted) == int(newest) - 1
