# SPDX-License-Identifier: Apache-2.0
"""Write small data sets with known bytes, as folders or archives, and run converters on them."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
from typing import Dict, Iterable, List, Sequence

from support.commands import ROOT

REPOSITORY = str(ROOT)
MAGIC = bytes.fromhex("0a23d7ce")  # first bytes of each record of a RecordIO file, little-endian
OUTPUT_FILES = [split + suffix for split in ("train", "val") for suffix in (".rec", ".idx", ".lst")]
# A JPEG's start, first segment (JFIF) and start-of-scan marker, which the check of ends needs.
JPEG_HEADER = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xda"
JPEG_END = b"\xff\xd9"
CLASSES = ("n01440764", "n01443537", "n02085620")
LABEL_FILES = {  # kind of label file -> its usual name
    "valprep.sh": "valprep.sh",
    "list": "imagenet_2012_validation_synset_labels.txt",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


def jpeg(body: bytes = b"", seed: object = None, size: int = 0) -> bytes:
    """Return bytes that the check of ends accepts as a JPEG; 10 bytes precede the body.

    Args:
        body: the bytes between header and end marker.
        seed: if not None, the body is `size` random bytes.
        size: bytes of a random body.
    """
    if seed is not None:
        body = random.Random(seed).getrandbits(8 * size).to_bytes(size, "big") if size else b""
    return JPEG_HEADER + body + JPEG_END


def write_files(folder: object, files: Dict[str, bytes]) -> None:
    """Write {relative path: content} under `folder`."""
    for relative, content in files.items():
        path = os.path.join(str(folder), relative)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(content)


def small_dataset(
    classes: Iterable[str] = CLASSES, train: int = 7, val: int = 2, seed: int = 1
) -> Dict[str, bytes]:
    """Return {path: content} of a data set with class folders in train/ and val/.

    Sizes are odd and even, small and larger.

    Args:
        classes: names of the class folders.
        train: training images in each class.
        val: validation images in each class.
        seed: of sizes and contents.
    """
    source, files = random.Random(seed), {}
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            for number in range(count):
                files[f"{split}/{name}/{name}_{number}.JPEG"] = jpeg(
                    seed=source.random(), size=source.choice([0, 1, 2, 3, 5, 500, 4099, 20000])
                )
    return files


def run_prepare(
    *arguments: object, module: str = "prepare.imagenet", **options: object
) -> subprocess.CompletedProcess:
    """Run one of prepare's commands; return the finished process with its output as text."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    options.setdefault("cwd", REPOSITORY)
    return subprocess.run(command, capture_output=True, text=True, **options)


def run_program(program: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run Python source in a process; return it with its output as text."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def program_stopping_in(module: str, function: str) -> str:
    """Return a program: prepare.imagenet that stops itself at each call of one function.

    It stops with SIGSTOP; the caller continues it with SIGCONT.

    Args:
        module: name of a module of prepare.
        function: name of the function in it.
    """
    return f"""
import os, signal, sys
from prepare import imagenet, {module} as module
original = module.{function}
def stop_and_call(*arguments, **options):
    os.kill(os.getpid(), signal.SIGSTOP)
    return original(*arguments, **options)
module.{function} = stop_and_call
sys.exit(imagenet.main(sys.argv[1:]))
"""


def run_im2rec(source: object, folder: object, threads: int = 1) -> None:
    """Run MXNet's own converter, both steps for both splits, in processes of their own."""
    import mxnet

    script = os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py")
    os.makedirs(str(folder), exist_ok=True)
    for split in ("train", "val"):
        paths = [os.path.join(str(folder), split), os.path.join(str(source), split)]
        for step in (["--list", "--recursive"], ["--pass-through", "--num-thread", str(threads)]):
            subprocess.run(
                [sys.executable, script, *step, *paths], check=True, stdout=subprocess.DEVNULL
            )


def read_files(folder: object, names: Iterable[str] = OUTPUT_FILES) -> Dict[str, bytes]:
    """Return {name: content} of files in `folder`, by default of a conversion's output."""
    contents = {}
    for name in names:
        with open(os.path.join(str(folder), name), "rb") as stream:
            contents[name] = stream.read()
    return contents


def write_tar(
    program: str, tar_format: str, archive: object, folder: object, names: Sequence[str]
) -> None:
    """Write a tar archive.

    Args:
        program: "gnutar", "bsdtar" or "python".
        tar_format: "ustar", "gnu" or "pax"; with GNU tar also "v7".
        archive: path of the archive.
        folder: the folder that contains the files.
        names: files and folders to write, relative to `folder`.
    """
    archive, folder = str(archive), str(folder)
    if program == "python":
        formats = {
            "ustar": tarfile.USTAR_FORMAT,
            "gnu": tarfile.GNU_FORMAT,
            "pax": tarfile.PAX_FORMAT,
        }
        with tarfile.open(archive, "w", format=formats[tar_format]) as tar:
            for name in names:
                tar.add(os.path.join(folder, name), arcname=name)
        return
    command = {"gnutar": "tar", "bsdtar": "bsdtar"}[program]
    if (program, tar_format) == ("bsdtar", "gnu"):
        tar_format = "gnutar"
    subprocess.run(
        [command, f"--format={tar_format}", "-cf", archive, "-C", folder, "--", *names],
        check=True,
        env=dict(os.environ, LC_ALL="C.UTF-8"),
    )


def extract_tar(archive: object, folder: object) -> None:
    """Unpack a tar archive with tar, whatever its compression."""
    os.makedirs(str(folder), exist_ok=True)
    subprocess.run(["tar", "-xf", str(archive), "-C", str(folder)], check=True)


def tar_programs() -> List[str]:
    """Return the programs for `write_tar` that this machine has."""
    commands = {"gnutar": "tar", "bsdtar": "bsdtar", "python": sys.executable}
    return [program for program, command in commands.items() if shutil.which(command)]


def write_class_archives(
    folder: object, target: object, program: str = "python", tar_format: str = "ustar"
) -> List[str]:
    """Write one archive for each class folder in `folder`; return the archives' names, sorted."""
    os.makedirs(str(target), exist_ok=True)
    classes = sorted(os.listdir(str(folder)))
    for name in classes:
        class_folder = os.path.join(str(folder), name)
        archive = os.path.join(str(target), f"{name}.tar")
        write_tar(program, tar_format, archive, class_folder, sorted(os.listdir(class_folder)))
    return [f"{name}.tar" for name in classes]


def write_official_archives(
    folder: object,
    target: object,
    program: str = "python",
    tar_format: str = "ustar",
    labels: Sequence[str] = ("valprep.sh",),
) -> None:
    """Write ImageNet's two archives, and files with validation labels.

    Args:
        folder: the data set as class folders in train/ and val/.
        target: the folder to write to.
        program: see write_tar.
        tar_format: see write_tar.
        labels: which kinds of label files to write, of LABEL_FILES.
    """
    target = str(target)
    scratch = os.path.join(target, "scratch")
    os.makedirs(os.path.join(scratch, "val"))
    train = os.path.join(str(folder), "train")
    archives = write_class_archives(train, scratch, program, tar_format)
    train_archive = os.path.join(target, "ILSVRC2012_img_train.tar")
    write_tar(program, tar_format, train_archive, scratch, archives)

    class_of = {}
    flat = os.path.join(scratch, "val")
    for name in sorted(os.listdir(os.path.join(str(folder), "val"))):
        for image in os.listdir(os.path.join(str(folder), "val", name)):
            shutil.copy(os.path.join(str(folder), "val", name, image), flat)
            class_of[image] = name
    val_archive = os.path.join(target, "ILSVRC2012_img_val.tar")
    write_tar(program, tar_format, val_archive, flat, sorted(os.listdir(flat)))
    shutil.rmtree(scratch)
    write_label_files(target, sorted(os.listdir(train)), class_of, labels)


def write_label_files(
    folder: str, classes: Sequence[str], class_of: Dict[str, str], kinds: Sequence[str]
) -> None:
    """Write validation labels, {image name: class}, as files of some of the kinds LABEL_FILES."""
    ordered = [class_of[image] for image in sorted(class_of)]
    paths = {kind: os.path.join(folder, LABEL_FILES[kind]) for kind in kinds}
    if "valprep.sh" in kinds:
        with open(paths["valprep.sh"], "w") as stream:
            stream.write("".join(f"mkdir -p {name}\n" for name in classes))
            stream.write("".join(f"mv {image} {class_of[image]}/\n" for image in sorted(class_of)))
    if "list" in kinds:
        with open(paths["list"], "w") as stream:
            stream.write("".join(f"{name}\n" for name in ordered))
    if "devkit" in kinds:
        write_devkit(paths["devkit"], classes, ordered)


def write_devkit(path: str, classes: Sequence[str], ground_truth: Sequence[str]) -> None:
    """Write a devkit archive; as in the real one, IDs are not in the order of sorted synsets.

    Args:
        path: path of the archive.
        classes: all synsets, sorted.
        ground_truth: the synset of each validation image, in order.
    """
    import numpy as np
    from scipy.io import savemat

    id_of = {name: number + 1 for number, name in enumerate(reversed(classes))}
    synsets = np.zeros(
        (len(classes), 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_train_images", "O")]
    )
    for row, name in enumerate(reversed(classes)):
        synsets[row, 0] = (float(id_of[name]), name, 7.0)
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    truth_lines = "".join(f"{id_of[name]}\n" for name in ground_truth)
    files = {
        "meta.mat": matrix.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": truth_lines.encode(),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
