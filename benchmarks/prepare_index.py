# SPDX-License-Identifier: Apache-2.0
"""python benchmarks/prepare_index.py [FOLDER]: time and memory of planning all of ImageNet, from a stand-in archive.

Writes an ILSVRC2012_img_train.tar of the true shape (1,000 class archives, 1,281,167 images, 138 GB by its sizes) of which
only the headers take space (5 GB: a block each), lists and plans it in a process of its own and prints seconds and peak memory.
"""

import os
import shutil
import sys
import tarfile
import tempfile
import time

IMAGES, CLASSES, BYTES = 1281167, 1000, 107000

PLAN = """
import resource, sys, time
sys.path.insert(0, sys.argv[2])
from prepare import plan, tar_index
start = time.perf_counter()
listing = tar_index.list_archive(sys.argv[1], int(sys.argv[3]))
listed = time.perf_counter()
made = plan.make_plan("train", listing)
pieces = made.pieces()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
assert not made.problems
print("%d images, %d pieces: index %.1f s, plan %.1f s, peak memory %.0f MB, output %.1f GB" % (
    len(made.paths), len(pieces), listed - start, time.perf_counter() - listed, peak, made.output_bytes() / 1e9))
"""


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_archive(path):
    """Writes the stand-in; returns the number of images."""
    made = 0
    with open(path, "wb") as stream:
        at = 0
        for number in range(CLASSES):
            count = IMAGES * (number + 1) // CLASSES - made
            sizes = [BYTES + (made + image) * 7919 % 5000 for image in range(count)]
            inner = sum(512 + (size + 511) // 512 * 512 for size in sizes) + 1024
            os.pwrite(stream.fileno(), header("n%08d.tar" % number, inner), at)
            at += 512
            for image, size in enumerate(sizes):
                os.pwrite(stream.fileno(), header("n%08d_%d.JPEG" % (number, image), size), at)
                at += 512 + (size + 511) // 512 * 512
            at += 1024
            made += count
        os.truncate(path, at + 1024)
    return made


def main():
    folder = tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None)
    try:
        path = os.path.join(folder, "ILSVRC2012_img_train.tar")
        start = time.perf_counter()
        write_archive(path)
        print(
            "stand-in of %.1f GB written in %.0f s"
            % (os.path.getsize(path) / 1e9, time.perf_counter() - start),
            flush=True,
        )
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        for workers in ("1", "4"):
            os.spawnl(os.P_WAIT, sys.executable, sys.executable, "-c", PLAN, path, root, workers)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
