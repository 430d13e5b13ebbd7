# SPDX-License-Identifier: Apache-2.0
"""python benchmarks/prepare_vs_im2rec.py: prepare.imagenet beside MXNet's im2rec and cat, on the same files in turn.

Makes a folder-per-class data set and archives of it (random bytes between a JPEG's first and last: nothing decodes them),
warms the page cache, runs all contestants one after the other in each round, compares their bytes, and prints medians and
ratios. With --delay-ms it shows instead how the number of workers hides the latency of storage: every read sleeps.
"""

import argparse
import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START, END = b"\xff\xd8\xff\xe0\x00\x04xx\xff\xda", b"\xff\xd9"

SLOW = (
    """
import os, sys, time
inner, delay = os.preadv, float(sys.argv[1])
def slow(*arguments):
    time.sleep(delay)
    return inner(*arguments)
os.preadv = slow
sys.path.insert(0, %r)
from prepare.imagenet import main
sys.exit(main(sys.argv[2:]))
"""
    % ROOT
)


def make(folder, images, kilobytes, classes):
    """Writes both halves as class folders and as archives; sizes vary as photographs' do. Returns the bytes of train/."""
    random, total = np.random.RandomState(0), 0
    for half, count in (("train", images), ("val", classes)):
        for number in range(count):
            name = "n%08d" % (number % classes)
            path = os.path.join(folder, "folders", half, name, "%s_%d.JPEG" % (name, number))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            body = random.bytes(int(random.gamma(4, kilobytes * 1000 / 4)))
            with open(path, "wb") as stream:
                stream.write(START + body + END)
            total += len(body) + 12 if half == "train" else 0
    os.makedirs(os.path.join(folder, "archives", "val"))
    with tarfile.open(os.path.join(folder, "archives", "ILSVRC2012_img_train.tar"), "w") as outer:
        for name in sorted(os.listdir(os.path.join(folder, "folders", "train"))):
            inner = os.path.join(folder, name + ".tar")
            with tarfile.open(inner, "w") as tar:
                place = os.path.join(folder, "folders", "train", name)
                for image in sorted(os.listdir(place)):
                    tar.add(os.path.join(place, image), arcname=image)
            outer.add(inner, arcname=name + ".tar")
            os.remove(inner)
    shutil.copytree(
        os.path.join(folder, "folders", "val"),
        os.path.join(folder, "archives", "val"),
        dirs_exist_ok=True,
    )
    return total


def timed(command, output):
    """Seconds of a shell command that writes into the new folder `output`."""
    shutil.rmtree(output, ignore_errors=True)
    os.makedirs(output)
    os.sync()
    start = time.perf_counter()
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    return time.perf_counter() - start


def im2rec(source, output, threads):
    """The command for both steps, in one shell."""
    import mxnet

    script = os.path.join(os.path.dirname(mxnet.__file__), "tools", "im2rec.py")
    steps = ("--list --recursive", "--pass-through --num-thread %d" % threads)
    places = "%s/train %s/train" % (output, source)
    return [
        "sh",
        "-c",
        " && ".join("%s %s %s %s" % (sys.executable, script, step, places) for step in steps),
    ]


def compete(folder, total, images, rounds, threads):
    folders, archives = os.path.join(folder, "folders"), os.path.join(folder, "archives")
    out = {
        name: os.path.join(folder, "out", name) for name in ("im2rec", "folders", "archives", "cat")
    }
    ours = [sys.executable, "-m", "prepare.imagenet"]
    contestants = {
        "im2rec --num-thread %d" % count: (im2rec(folders, out["im2rec"], count), out["im2rec"])
        for count in threads
    }
    contestants["cat"] = (
        ["sh", "-c", "find %s/train -type f | xargs cat > %s/all" % (folders, out["cat"])],
        out["cat"],
    )
    contestants["prepare, folders"] = (ours + [folders, out["folders"]], out["folders"])
    contestants["prepare, archives"] = (ours + [archives, out["archives"]], out["archives"])
    seconds = {name: [] for name in contestants}
    subprocess.run(["sh", "-c", "find %s -type f | xargs cat > /dev/null" % folder], check=True)
    for _ in range(rounds):
        for name, (command, output) in contestants.items():
            seconds[name].append(timed(command, output))
    for suffix in (".rec", ".idx", ".lst"):
        for name in ("folders", "archives"):
            same = filecmp.cmp(
                out["im2rec"] + "/train" + suffix, out[name] + "/train" + suffix, shallow=False
            )
            assert same, "train%s differs between im2rec and prepare from %s" % (suffix, name)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in median.items():
        spread = "%.2f-%.2f" % (min(seconds[name]), max(seconds[name]))
        print(
            "%-24s %6.2f s (%s)  %6.0f images/s  %5.0f MB/s"
            % (name, value, spread, images / value, total / 1e6 / value)
        )
    best = min((name for name in median if name.startswith("im2rec")), key=median.get)
    print("byte-identical: yes")
    print(
        "ratio to %s: folders %.1f, archives %.1f"
        % (
            best,
            median[best] / median["prepare, folders"],
            median[best] / median["prepare, archives"],
        )
    )
    print(
        "ratio to cat: folders %.2f, archives %.2f"
        % (median["cat"] / median["prepare, folders"], median["cat"] / median["prepare, archives"])
    )
    print("archives to folders: %.2f" % (median["prepare, folders"] / median["prepare, archives"]))


def slow_storage(folder, images, delay, workers):
    for kind in ("folders", "archives"):
        for count in workers:
            output = os.path.join(folder, "out")
            seconds = timed(
                [
                    sys.executable,
                    "-c",
                    SLOW,
                    str(delay),
                    os.path.join(folder, kind),
                    output,
                    "--workers=%d" % count,
                ],
                output,
            )
            print(
                "%-8s %3d workers: %6.0f images/s (%.0f if nothing but the delay took time)"
                % (kind, count, images / seconds, count / delay)
            )


def main():
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
        help="what to try for im2rec --num-thread",
    )
    parser.add_argument(
        "--delay-ms",
        type=float,
        help="sleep this long in every read, and compare numbers of workers",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 4, 16, 64], help="for --delay-ms"
    )
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(dir=arguments.folder)
    try:
        total = make(folder, arguments.images, arguments.kilobytes, arguments.classes)
        print(
            "%d images, %.2f GB, %d CPUs"
            % (arguments.images, total / 1e9, len(os.sched_getaffinity(0))),
            flush=True,
        )
        if arguments.delay_ms:
            slow_storage(folder, arguments.images, arguments.delay_ms / 1000, arguments.workers)
        else:
            compete(folder, total, arguments.images, arguments.rounds, arguments.threads)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
