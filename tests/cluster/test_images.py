# SPDX-License-Identifier: Apache-2.0
"""Images without a container engine: their packages exist, they build, and the CPU image trains.

The steps of Dockerfile and Dockerfile.cpu run in folders made by debootstrap. Needs the network;
the steps also need root and debootstrap, for the CPU 6 GB and a quarter of an hour, for GPUs 30 GB
and half an hour, but no GPU:

    ./run_tests.sh tests/cluster/test_images.py -m slow

Base images cannot be queried without a client of their registry. Looked up by hand:
nvcr.io/nvidia/mxnet:22.04-py3 in NVIDIA's release notes of the series (Ubuntu 20.04, Python 3.8,
Open MPI 4.1, Horovod 0.23, DALI 1) and in an MLPerf submission that used it.
"""

import gzip
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest
from support.commands import ROOT

pytestmark = pytest.mark.slow
MIRROR, UBUNTU = "http://deb.debian.org/debian", "http://archive.ubuntu.com/ubuntu"
# The distribution of a Dockerfile's last image: mirror, release, sections enabled in the image.
RELEASES = {
    "Dockerfile": (MIRROR, "bookworm", ("main", "contrib", "non-free")),
    "Dockerfile.cpu": (MIRROR, "bookworm", ("main",)),
    "Dockerfile.ngc": (UBUNTU, "focal", ("main", "universe")),
}


def commands(dockerfile, pattern):
    """Return the words after each such command of a Dockerfile, without options."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / dockerfile).read_text())
    for name, default in re.findall(r"^ARG (\w+)=(\S+)$", text, re.M):
        text = text.replace(f"${{{name}}}", default)
    return [
        word
        for found in re.findall(rf"{pattern}([^&\n]*)", text)
        for word in found.split()
        if not word.startswith("-")
    ]


@pytest.mark.parametrize("dockerfile", RELEASES)
def test_the_distribution_has_the_packages(dockerfile):
    mirror, release, sections = RELEASES[dockerfile]
    known = set()
    for section in sections:
        with urllib.request.urlopen(
            f"{mirror}/dists/{release}/{section}/binary-amd64/Packages.gz", timeout=120
        ) as answer:
            known |= set(
                re.findall(r"^Package: (.*)$", gzip.decompress(answer.read()).decode(), re.M)
            )
    wanted = set(commands(dockerfile, "apt-get install"))
    assert len(wanted) >= 4 and wanted <= known, wanted - known


@pytest.mark.parametrize("python", ["3.9", "3.10", "3.11"])
@pytest.mark.parametrize("name", ["build", "cpu", "gpu", "cuda", "dev"])
def test_the_index_has_a_wheel_of_every_package_with_its_hash(tmp_path, name, python):
    """Downloads up to 2 GB each."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes", "--no-deps"]
        + ["--only-binary", ":all:", "--python-version", python, "--dest", tmp_path]
        + [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 24, 17, 12, 5)]
        + [f"--platform=manylinux{year}_x86_64" for year in (2014, 2010, 1)]
        + ["-r", ROOT / "requirements" / f"{name}.txt"],
        text=True,
        capture_output=True,
    )
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr


class Build:
    """Run the lines of a Dockerfile in folders."""

    def __init__(self, folder, context):
        self.folder, self.context, self.stages, self.clean = folder, context, {}, folder / "debian"
        subprocess.run(
            ["debootstrap", "--variant=minbase", "bookworm", self.clean, MIRROR],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        # As in Docker's image.
        (self.clean / "etc/apt/sources.list").unlink()
        (self.clean / "etc/apt/sources.list.d/debian.sources").write_text(
            f"Types: deb\nURIs: {MIRROR}\nSuites: bookworm bookworm-updates\nComponents: main\n"
        )

    def run_file(self, path):
        self.arguments = {}
        text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.M))
        for line in filter(None, text.splitlines()):
            word, _, rest = line.partition(" ")
            print(line, flush=True)
            getattr(self, f"do_{word.lower()}")(rest)
        return self

    def do_arg(self, rest):
        name, _, value = rest.partition("=")
        self.arguments[name] = value

    def do_from(self, rest):
        assert self.arguments[rest.split()[0].strip("${}")] == "debian:12-slim"
        self.user = "0:0"
        self.root, self.where, self.env = (
            self.folder / f"stage{len(self.stages)}",
            "/",
            {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
        )
        self.stages[(rest.split(" AS ") + [""])[1]] = self.root
        subprocess.run(["cp", "-a", self.clean, self.root], check=True)
        # A container engine provides name servers; this host's certificates are needed as well.
        for file in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
            shutil.copy(file, self.root / "etc" / os.path.basename(file))

    def do_workdir(self, rest):
        self.where = rest
        (self.root / rest.strip("/")).mkdir(parents=True, exist_ok=True)

    def do_env(self, rest):
        name, _, value = rest.partition("=")
        self.env[name] = value.replace("$PATH", self.env["PATH"])

    def do_label(self, rest):
        pass

    def do_user(self, rest):
        self.user = rest
        self.env["HOME"] = "/home/mxresnet"

    def do_cmd(self, rest):
        self.command = rest

    def do_copy(self, rest):
        *sources, target = rest.split()
        origin = self.context
        if sources[0].startswith("--from="):
            origin = self.stages[sources.pop(0).partition("=")[2]]
        path = self.root / os.path.join(self.where, target).strip("/")
        for source in sources:
            from_ = origin / source.strip("/")
            if from_.is_dir():  # docker copies the content of a folder
                path.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", f"{from_}/.", path], check=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(from_, path / from_.name if target.endswith("/") else path)

    def do_run(self, rest):
        command = shlex.quote(f"cd {self.where} && {rest}")
        script = (
            f"mount -t proc proc {self.root}/proc; mount --rbind /dev {self.root}/dev; "
            f"exec chroot --userspec={self.user} {self.root} /bin/sh -c {command}"
        )
        env = {**self.env, **self.arguments, "PIP_CERT": "/etc/ca-certificates.crt"}
        subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", script], env=env, check=True
        )


@pytest.fixture
def build(tmp_path):
    """A function that runs the lines of a Dockerfile, and returns the image."""
    if os.getuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap")
    context = tmp_path / "context"
    context.mkdir()
    kept = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for pattern in kept:
        for path in ROOT.glob(pattern):
            subprocess.run(["cp", "-a", path, context], check=True)
    yield lambda name: Build(tmp_path, context).run_file(ROOT / name)
    for stage in tmp_path.iterdir():
        if stage.name.startswith("stage") or stage.name == "debian":
            shutil.rmtree(stage, ignore_errors=True)


def check_image(image):
    image.do_run("! ls /etc/ssh/ssh_host_* && test $(id -u) = 1000")
    image.do_run("/usr/sbin/sshd -T | grep -q 'strictmodes yes'")
    image.do_run("test $(./setup_env.sh) = /workspace/mxresnet/.venv/bin/python")
    image.do_run("! python -c 'import pytest' && ! command -v cmake && ! command -v g++")


def test_the_cpu_image_builds_and_trains(build):
    image = build("Dockerfile.cpu")
    check_image(image)
    image.do_run(
        "DGXSYSTEM=CPU_digits LOGDIR=/results ./run_and_time.sh "
        "--num-epochs 2 --num-layers 18 --accuracy-threshold 0.01"
    )


# Run without a GPU: a library is in the place of the NVIDIA driver's, all others are real.
CHECK_GPU_IMAGE = """
import ctypes, re
import mxnet as mx
assert mx.runtime.Features().is_enabled("CUDA") and mx.context.num_gpus() == 0
import horovod.mxnet as hvd
assert hvd.nccl_built() and hvd.mpi_built()
from mxresnet.model.cudnn_bn import build
ctypes.CDLL(str(build.library_path("gpu")))
with open("/proc/self/maps") as maps:
    loaded = set(re.findall(r"/\\S*/lib(?:cudnn|nccl|cublas|cudart)\\.so\\S*", maps.read()))
assert len(loaded) == 4 and all("/.venv/" in path for path in loaded), loaded
"""


@pytest.mark.timeout(7200)
def test_the_gpu_image_builds_without_a_gpu(build):
    """As does the environment on a clean machine: both are made by setup_env.sh."""
    image = build("Dockerfile")
    check_image(image)
    (image.root / "tmp/check.py").write_text(CHECK_GPU_IMAGE)
    image.do_run("! python /tmp/check.py")  # no driver
    image.do_run(
        "python -m mxresnet --synth-data 1 2>&1 | grep 'this environment is for GPUs, and the'"
    )
    (mxnet,) = image.root.glob("workspace/mxresnet/.venv/lib/python3*/site-packages/mxnet")
    symbols = subprocess.check_output(["nm", "-D", mxnet / "libmxnet.so"], text=True)
    functions = re.findall(r"^ *U (cu[A-Z]\w*)$", symbols, re.M)
    assert len(functions) == 10
    subprocess.run(
        ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", image.root / "tmp/libcuda.so.1"],
        input="".join(f'extern "C" int {name}() {{ return 100; }}\n' for name in functions),
        text=True,
        check=True,
    )
    image.do_run("LD_LIBRARY_PATH=/tmp python /tmp/check.py")
