# SPDX-License-Identifier: Apache-2.0
"""python benchmarks/prepare_index.py [FOLDER]: measure time and memory of planning all of ImageNet.

Writes a sparse ILSVRC2012_img_train.tar with the real number of members (1,000 class archives,
1,281,167 images). Its nominal size is 138 GB; only the headers use disk space, 5 GB in file system
blocks. Then a new process lists and plans it, with 1 and with 4 threads, and prints seconds and
peak memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time

NUM_IMAGES, NUM_CLASSES, IMAGE_BYTES = 1281167, 1000, 107000
BLOCK_BYTES = 512
END_BYTES = 1024  # two blocks of zeros end an archive

MEASURE = """
import re, sys, time
sys.path.insert(0, sys.argv[2])
from prepare import plan, tar_index
start_seconds = time.perf_counter()
listing = tar_index.list_archive(sys.argv[1], int(sys.argv[3]))
listed_seconds = time.perf_counter()
made = plan.make_plan("train", listing)
pieces = made.pieces()
planned_seconds = time.perf_counter()
# Not ru_maxrss, which includes the process that started this one.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
assert not made.problems
print(
    f"{len(made.paths)} images, {len(pieces)} pieces: "
    f"index {listed_seconds - start_seconds:.1f} s, plan {planned_seconds - listed_seconds:.1f} s, "
    f"peak memory {peak_kib * 1.024e-3:.0f} MB, output {made.output_bytes() / 1e9:.1f} GB"
)
"""


def padded(size: int) -> int:
    """Return `size` bytes rounded up to whole blocks."""
    return (size + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def header(name: str, size: int) -> bytes:
    """Return the tar header of a file with this name and this many bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_archive(path: str) -> None:
    """Write the archive of class archives; the images' data are holes in the file."""
    num_written = 0
    with open(path, "wb") as stream:
        descriptor, offset = stream.fileno(), 0
        for number in range(NUM_CLASSES):
            count = NUM_IMAGES * (number + 1) // NUM_CLASSES - num_written
            sizes = [IMAGE_BYTES + (num_written + image) * 7919 % 5000 for image in range(count)]
            class_bytes = sum(BLOCK_BYTES + padded(size) for size in sizes) + END_BYTES
            os.pwrite(descriptor, header(f"n{number:08d}.tar", class_bytes), offset)
            offset += BLOCK_BYTES
            for image, size in enumerate(sizes):
                os.pwrite(descriptor, header(f"n{number:08d}_{image}.JPEG", size), offset)
                offset += BLOCK_BYTES + padded(size)
            offset += END_BYTES
            num_written += count
    os.truncate(path, offset + END_BYTES)


def main() -> None:
    folder = tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        path = os.path.join(folder, "ILSVRC2012_img_train.tar")
        start_seconds = time.perf_counter()
        write_archive(path)
        size_gb, seconds = os.path.getsize(path) / 1e9, time.perf_counter() - start_seconds
        print(f"sparse archive of {size_gb:.1f} GB written in {seconds:.0f} s", flush=True)
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        for workers in ("1", "4"):
            command = [sys.executable, "-c", MEASURE, path, root, workers]
            subprocess.run(command, check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
