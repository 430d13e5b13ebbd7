# SPDX-License-Identifier: Apache-2.0
"""Small data sets with known bytes, archives of them by three programs, and im2rec to compare with."""

import os
import random
import shutil
import subprocess
import sys
import tarfile

MAGIC = bytes.fromhex("0a23d7ce")
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = [half + suffix for half in ("train", "val") for suffix in (".rec", ".idx", ".lst")]
# A JPEG's first segment (JFIF), its scan and its end: what the check by first and last bytes looks for.
HEAD = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xda"


def jpeg(body=b"", seed=None, size=0):
    """Bytes that pass for a JPEG; 10 bytes stand before `body`."""
    if seed is not None:
        body = random.Random(seed).getrandbits(8 * size).to_bytes(size, "big") if size else b""
    return HEAD + body + b"\xff\xd9"


def write(folder, files):
    """Writes {relative path: bytes} under `folder`."""
    for path, content in files.items():
        path = os.path.join(str(folder), path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(content)


def small(classes=("n01440764", "n01443537", "n02085620"), train=7, val=2, seed=1):
    """{path: bytes} of a data set with both halves; sizes are odd and even, small and not so small."""
    source, files = random.Random(seed), {}
    for half, count in (("train", train), ("val", val)):
        for name in classes:
            for number in range(count):
                path = "%s/%s/%s_%d.JPEG" % (half, name, name, number)
                files[path] = jpeg(
                    seed=source.random(), size=source.choice([0, 1, 2, 3, 5, 500, 4099, 20000])
                )
    return files


def prepare(*arguments, module="prepare.imagenet", **options):
    """Runs the command; returns the finished process with its output as text."""
    command = [sys.executable, "-m", module] + [str(argument) for argument in arguments]
    options.setdefault("cwd", REPOSITORY)
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def stopping_in(module, function):
    """The command as a program that stops itself (SIGSTOP) each time this function of one of prepare's modules is called."""
    return """
import os, signal, sys
from prepare import imagenet, %(module)s as there
real = there.%(function)s
def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments)
there.%(function)s = stopped
sys.exit(imagenet.main(sys.argv[1:]))
""" % {"module": module, "function": function}


def im2rec(source, folder, threads=1):
    """MXNet's own converter, both steps for both halves, in processes of their own."""
    import mxnet

    script = os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py")
    os.makedirs(str(folder), exist_ok=True)
    for half in ("train", "val"):
        places = [os.path.join(str(folder), half), os.path.join(str(source), half)]
        for step in (["--list", "--recursive"], ["--pass-through", "--num-thread", str(threads)]):
            subprocess.run(
                [sys.executable, script, *step, *places], check=True, stdout=subprocess.DEVNULL
            )


def contents(folder, names=FILES):
    found = {}
    for name in names:
        with open(os.path.join(str(folder), name), "rb") as stream:
            found[name] = stream.read()
    return found


def pack(program, form, archive, folder, names):
    """Writes `names` of `folder` to a tar archive with "gnutar", "bsdtar" or "python" in "ustar", "gnu" or "pax" format."""
    archive, folder = str(archive), str(folder)
    if program == "python":
        forms = {
            "ustar": tarfile.USTAR_FORMAT,
            "gnu": tarfile.GNU_FORMAT,
            "pax": tarfile.PAX_FORMAT,
        }
        with tarfile.open(archive, "w", format=forms[form]) as tar:
            for name in names:
                tar.add(os.path.join(folder, name), arcname=name)
        return
    command = {"gnutar": "tar", "bsdtar": "bsdtar"}[program]
    form = {("bsdtar", "gnu"): "gnutar"}.get((program, form), form)
    locale = dict(os.environ, LC_ALL="C.UTF-8")
    subprocess.run(
        [command, "--format=" + form, "-cf", archive, "-C", folder, "--", *names],
        check=True,
        env=locale,
    )


def programs():
    """The programs that this machine has for `pack`."""
    return [
        program
        for program, command in (
            ("gnutar", "tar"),
            ("bsdtar", "bsdtar"),
            ("python", sys.executable),
        )
        if shutil.which(command)
    ]


def official(folder, target, program="python", form="ustar", labels=("valprep.sh",)):
    """Makes ImageNet's archives in `target` from the class folders in `folder`, and files with validation labels."""
    folder, target = str(folder), str(target)
    os.makedirs(target, exist_ok=True)
    scratch = os.path.join(target, "scratch")
    os.makedirs(os.path.join(scratch, "val"))
    classes = sorted(os.listdir(os.path.join(folder, "train")))
    for name in classes:
        place = os.path.join(folder, "train", name)
        pack(program, form, os.path.join(scratch, name + ".tar"), place, sorted(os.listdir(place)))
    pack(
        program,
        form,
        os.path.join(target, "ILSVRC2012_img_train.tar"),
        scratch,
        [name + ".tar" for name in classes],
    )
    moves = {}
    for name in sorted(os.listdir(os.path.join(folder, "val"))):
        for image in os.listdir(os.path.join(folder, "val", name)):
            shutil.copy(os.path.join(folder, "val", name, image), os.path.join(scratch, "val"))
            moves[image] = name
    place = os.path.join(scratch, "val")
    pack(
        program,
        form,
        os.path.join(target, "ILSVRC2012_img_val.tar"),
        place,
        sorted(os.listdir(place)),
    )
    shutil.rmtree(scratch)
    if "valprep.sh" in labels:
        with open(os.path.join(target, "valprep.sh"), "w") as stream:
            stream.write("".join("mkdir -p %s\n" % name for name in classes))
            stream.write("".join("mv %s %s/\n" % (image, moves[image]) for image in sorted(moves)))
    if "list" in labels:
        with open(
            os.path.join(target, "imagenet_2012_validation_synset_labels.txt"), "w"
        ) as stream:
            stream.write("".join(moves[image] + "\n" for image in sorted(moves)))
    if "devkit" in labels:
        devkit(
            os.path.join(target, "ILSVRC2012_devkit_t12.tar.gz"),
            classes,
            [moves[image] for image in sorted(moves)],
        )


def devkit(path, classes, truth):
    """Writes a devkit archive whose IDs do not follow the order of the synsets' names, as the real ones do not."""
    import io

    import numpy as np
    from scipy.io import savemat

    identities = {name: number + 1 for number, name in enumerate(reversed(classes))}
    synsets = np.zeros(
        (len(classes), 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_train_images", "O")]
    )
    for row, name in enumerate(reversed(classes)):
        synsets[row, 0] = (float(identities[name]), name, 7.0)
    matrix = io.BytesIO()
    savemat(matrix, {"synsets": synsets})
    files = {
        "meta.mat": matrix.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": "".join(
            "%d\n" % identities[name] for name in truth
        ).encode(),
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo("ILSVRC2012_devkit_t12/data/" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
