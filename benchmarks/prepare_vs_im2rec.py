# SPDX-License-Identifier: Apache-2.0
"""Compare the speed of prepare.imagenet with MXNet's im2rec, with cat, and with the usual recipe.

Writes a data set with one folder per class, and the official archives of it. Nothing decodes the
images, so they are random bytes between the first and last bytes of a JPEG. Warms the page cache,
runs all contenders one after the other in each round, compares their output byte by byte, and
prints medians and ratios. The recipe is what users do without prepare: unpack both archives and the
class archives, move the validation images into class folders with valprep.sh, and run im2rec for
both splits. With --delay-ms every read of prepare sleeps, and the program instead measures how more
workers hide this latency.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Dict, List, Tuple

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VAL_SHARE = 50000 / 1281167  # ImageNet's number of validation images for each training image
JPEG_START, JPEG_END = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xda", b"\xff\xd9"

# Forces its output to the disk, as prepare does and the other contenders do not.
CAT_TO_DISK = "cat, then sync"

FORMAT = tarfile.USTAR_FORMAT  # as the official archives; Python's default adds headers
OUTPUTS = ("im2rec", "recipe", "folders", "archives", "cat", "synced")
SUFFIXES = (".rec", ".idx", ".lst")

# argv: delay in seconds, arguments of prepare.imagenet.
PROGRAM_WITH_SLOW_READS = f"""
import os, sys, time
original, delay_seconds = os.preadv, float(sys.argv[1])
def read_slowly(*arguments):
    time.sleep(delay_seconds)
    return original(*arguments)
os.preadv = read_slowly
sys.path.insert(0, {ROOT!r})
from prepare.imagenet import main
sys.exit(main(sys.argv[2:]))
"""


def write_sources(folder: str, images: int, kilobytes: float, classes: int) -> Tuple[int, int]:
    """Write both splits to folders/ and archives/; return the number and bytes of all images.

    Args:
        folder: Parent of folders/ and archives/.
        images: Number of training images.
        kilobytes: Mean size of an image; sizes vary as those of photographs do.
        classes: Number of classes.
    """
    folders, archives = os.path.join(folder, "folders"), os.path.join(folder, "archives")
    generator, num_bytes = np.random.RandomState(0), 0
    val_images = max(classes, int(images * VAL_SHARE))
    for split, count in (("train", images), ("val", val_images)):
        for number in range(count):
            name = f"n{number % classes:08d}"
            image = f"{name}_{number}" if split == "train" else f"ILSVRC2012_val_{number + 1:08d}"
            path = os.path.join(folders, split, name, f"{image}.JPEG")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            body = generator.bytes(int(generator.gamma(4, kilobytes * 1000 / 4)))
            with open(path, "wb") as stream:
                stream.write(JPEG_START + body + JPEG_END)
            num_bytes += len(JPEG_START) + len(body) + len(JPEG_END)
    os.makedirs(archives)
    write_train_archive(os.path.join(folders, "train"), archives)
    write_val_archive(os.path.join(folders, "val"), archives)
    return images + val_images, num_bytes


def write_train_archive(class_folders: str, archives: str) -> None:
    """Write an archive like the official training archive: it contains one archive per class."""
    with tarfile.open(
        os.path.join(archives, "ILSVRC2012_img_train.tar"), "w", format=FORMAT
    ) as outer:
        for name in sorted(os.listdir(class_folders)):
            inner = os.path.join(archives, f"{name}.tar")
            with tarfile.open(inner, "w", format=FORMAT) as tar:
                for image in sorted(os.listdir(os.path.join(class_folders, name))):
                    tar.add(os.path.join(class_folders, name, image), arcname=image)
            outer.add(inner, arcname=f"{name}.tar")
            os.remove(inner)


def write_val_archive(class_folders: str, archives: str) -> None:
    """Write an archive like the official validation archive, and a valprep.sh."""
    classes = sorted(os.listdir(class_folders))
    class_of = {
        image: name for name in classes for image in os.listdir(os.path.join(class_folders, name))
    }
    with tarfile.open(os.path.join(archives, "ILSVRC2012_img_val.tar"), "w", format=FORMAT) as tar:
        for image in sorted(class_of):
            tar.add(os.path.join(class_folders, class_of[image], image), arcname=image)
    with open(os.path.join(archives, "valprep.sh"), "w") as stream:
        stream.write("".join(f"mkdir -p {name}\n" for name in classes))
        stream.write("".join(f"mv {image} {class_of[image]}/\n" for image in sorted(class_of)))


def measure_seconds(command: List[str], output: str) -> float:
    """Return the run time of a command that writes into the new folder `output`."""
    shutil.rmtree(output, ignore_errors=True)
    os.makedirs(output)
    os.sync()
    start = time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    return time.perf_counter() - start


def im2rec_lines(source: str, output: str, threads: int) -> List[str]:
    """Return both steps of im2rec for both splits as lines of a shell script."""
    import mxnet

    script = os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py")
    steps = (["--list", "--recursive"], ["--pass-through", "--num-thread", str(threads)])
    return [
        shlex.join([sys.executable, script, *step, f"{output}/{split}", f"{source}/{split}"])
        for split in ("train", "val")
        for step in steps
    ]


def recipe_lines(archives: str, output: str, threads: int) -> List[str]:
    """Return the usual way from the official archives to records, as lines of a shell script."""
    raw = os.path.join(output, "raw")
    return [
        f"mkdir -p {raw}/train {raw}/val",
        f"tar -xf {archives}/ILSVRC2012_img_train.tar -C {raw}/train",
        f"cd {raw}/train",
        'for archive in *.tar; do mkdir "${archive%.tar}"',
        'tar -xf "$archive" -C "${archive%.tar}"; rm "$archive"; done',
        f"tar -xf {archives}/ILSVRC2012_img_val.tar -C {raw}/val",
        f"cd {raw}/val",
        f"bash {archives}/valprep.sh",
        *im2rec_lines(raw, output, threads),
    ]


def shell(lines: List[str]) -> List[str]:
    """Return the command that runs a shell script up to its first failure."""
    return ["sh", "-ec", "\n".join(lines)]


def contenders_in(folder: str, threads: List[int]) -> Dict[str, Tuple[List[str], str]]:
    """Return {name: (command, output folder)} of all contenders."""
    folders, archives = os.path.join(folder, "folders"), os.path.join(folder, "archives")
    outputs = {name: os.path.join(folder, "out", name) for name in OUTPUTS}
    prepare = [sys.executable, "-m", "prepare.imagenet"]
    contenders = {
        f"im2rec --num-thread {count}": (
            shell(im2rec_lines(folders, outputs["im2rec"], count)),
            outputs["im2rec"],
        )
        for count in threads
    }
    contenders["recipe"] = (
        shell(recipe_lines(archives, outputs["recipe"], threads[0])),
        outputs["recipe"],
    )
    cat = f"find {folders} -type f | xargs cat >"
    contenders["cat"] = (shell([f"{cat} {outputs['cat']}/all"]), outputs["cat"])
    synced = f"{outputs['synced']}/all"
    contenders[CAT_TO_DISK] = (shell([f"{cat} {synced}", f"sync {synced}"]), outputs["synced"])
    for kind, source in (("folders", folders), ("archives", archives)):
        contenders[f"prepare, {kind}"] = ([*prepare, source, outputs[kind]], outputs[kind])
    return contenders


def check_same_files(folder: str) -> None:
    """Raise RuntimeError unless prepare, im2rec and the recipe have written the same bytes."""
    for name in [f"{split}{suffix}" for split in ("train", "val") for suffix in SUFFIXES]:
        reference = os.path.join(folder, "out", "recipe", name)
        for kind in ("folders", "archives", "im2rec"):
            found = os.path.join(folder, "out", kind, name)
            if not filecmp.cmp(reference, found, shallow=False):
                raise RuntimeError(f"{name} differs between the recipe and {kind}")


def compare(folder: str, num_bytes: int, images: int, rounds: int, threads: List[int]) -> None:
    """Run all contenders in turn and print their speeds."""
    contenders = contenders_in(folder, threads)
    seconds: Dict[str, List[float]] = {name: [] for name in contenders}
    subprocess.run(["sh", "-c", f"find {folder} -type f | xargs cat > /dev/null"], check=True)
    for _ in range(rounds):
        for name, (command, output) in contenders.items():
            seconds[name].append(measure_seconds(command, output))
    check_same_files(folder)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f}-{max(seconds[name]):.2f}"
        print(
            f"{name:24} {median:6.2f} s ({spread})  {images / median:6.0f} images/s  "
            f"{num_bytes / 1e6 / median:5.0f} MB/s"
        )
    best_im2rec = min((name for name in medians if name.startswith("im2rec")), key=medians.get)
    from_folders, from_archives = medians["prepare, folders"], medians["prepare, archives"]
    print("byte-identical: yes")
    for name, digits in ((best_im2rec, 1), ("recipe", 1), ("cat", 2), (CAT_TO_DISK, 2)):
        print(
            f"ratio to {name}: folders {medians[name] / from_folders:.{digits}f}, "
            f"archives {medians[name] / from_archives:.{digits}f}"
        )
    print(f"archives to folders: {from_folders / from_archives:.2f}")


def measure_slow_storage(
    folder: str, images: int, delay_seconds: float, workers: List[int]
) -> None:
    """Print the speed with delayed reads for several numbers of workers."""
    program = [sys.executable, "-c", PROGRAM_WITH_SLOW_READS, str(delay_seconds)]
    output = os.path.join(folder, "out")
    for kind in ("folders", "archives"):
        for count in workers:
            command = [*program, os.path.join(folder, kind), output, f"--workers={count}"]
            seconds = measure_seconds(command, output)
            print(
                f"{kind:8} {count:3} workers: {images / seconds:6.0f} images/s "
                f"({count / delay_seconds:.0f} if nothing but the delay took time)"
            )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument(
        "--kilobytes", type=float, default=110, help="mean size of an image; ImageNet's is 108"
    )
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="values of im2rec's --num-thread to try",
    )
    parser.add_argument(
        "--delay-ms",
        type=float,
        help="sleep this long in every read, and compare numbers of workers",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 4, 16, 64], help="for --delay-ms"
    )
    parser.add_argument("--folder", help="work folder (default: the system's temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    arguments = parse_arguments()
    folder = tempfile.mkdtemp(dir=arguments.folder)
    try:
        images, num_bytes = write_sources(
            folder, arguments.images, arguments.kilobytes, arguments.classes
        )
        print(
            f"{images} images, {num_bytes / 1e9:.2f} GB, {len(os.sched_getaffinity(0))} CPUs",
            flush=True,
        )
        if arguments.delay_ms:
            delay_seconds = arguments.delay_ms / 1000
            measure_slow_storage(folder, images, delay_seconds, arguments.workers)
        else:
            compare(folder, num_bytes, images, arguments.rounds, arguments.threads)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
