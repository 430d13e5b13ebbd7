# SPDX-License-Identifier: Apache-2.0
"""Measure the effect of bfloat16 on accuracy, with Fashion-MNIST.

    python benchmarks/accuracy.py FOLDER [--images 12000] [--epochs 6] [--seeds 5]

FOLDER holds the four files of Fashion-MNIST (train-images-idx3-ubyte.gz ...). Debian's package
dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist; `apt-get download` and
`dpkg -x` can put them elsewhere. This program writes the first --images training images and all
10,000 test images as JPEGs of 32 x 32 pixels and converts them with prepare. Then `python -m
mxresnet` trains on them, one rank x one thread, with each seed in each precision, --jobs runs at a
time. The program prints the accuracy after the last epoch of each run, and for each precision the
mean and (in brackets) the standard deviation.
"""

import argparse
import concurrent.futures
import gzip
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import step

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIDE = 32
FLAGS = [
    "--image-shape",
    f"4,{SIDE},{SIDE}",
    "--resize",
    SIDE,
    "--min-random-area",
    0.5,
    "--batch-size",
    128,
    "--optimizer",
    "sgdwfastlars",
    "--lr",
    4,
    "--wd",
    1e-4,
    "--lr-step-epochs",
    "pow2",
    "--warmup-epochs",
    1,
    "--label-smoothing",
    0.1,
    "--fuse-bn-relu",
    1,
    "--accuracy-threshold",
    1,
    "--dali-threads",
    1,
    "--disp-batches",
    0,
]


def read_idx(path, header_bytes):
    """Return the bytes after the header of a compressed IDX file, the format of MNIST."""
    import numpy as np

    with gzip.open(path) as stream:
        return np.frombuffer(stream.read(), np.uint8, offset=header_bytes)


def write_jpegs(source, folder, images):
    """Write the images into class folders below folder/train and folder/val."""
    import cv2

    for split, name, limit in (("train", "train", images), ("val", "t10k", None)):
        pixels = read_idx(source / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:limit]
        for number, (image, label) in enumerate(
            zip(pixels, read_idx(source / f"{name}-labels-idx1-ubyte.gz", 8))
        ):
            class_folder = folder / split / f"class_{label}"
            class_folder.mkdir(parents=True, exist_ok=True)
            padded = cv2.copyMakeBorder(image, 2, 2, 2, 2, cv2.BORDER_CONSTANT)
            cv2.imwrite(
                str(class_folder / f"{number:05d}.jpg"),
                cv2.cvtColor(padded, cv2.COLOR_GRAY2BGR),
                [cv2.IMWRITE_JPEG_QUALITY, 95],
            )


def train(records, dtype, seed, epochs):
    """Train once; return the accuracy after the last epoch, the only one that is evaluated."""
    command = [
        sys.executable,
        "-m",
        "mxresnet",
        "--data-root",
        records,
        *FLAGS,
        "--dtype",
        dtype,
        "--seed",
        seed,
        "--num-epochs",
        epochs,
        "--eval-period",
        epochs,
        "--eval-offset",
        epochs - 1,
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **step.environment("bare", 1)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    found = re.findall(rf"after epoch {epochs}: accuracy ([\d.]+)", done.stdout)
    if len(found) != 1:
        raise SystemExit(f"{dtype}, seed {seed} failed:\n{done.stdout[-3000:]}")
    print(f"{dtype}, seed {seed}: {found[0]}", flush=True)
    return float(found[0])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    for name, default in (("images", 12000), ("epochs", 6), ("seeds", 5), ("jobs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        jpegs, records = pathlib.Path(scratch, "jpegs"), pathlib.Path(scratch, "records")
        write_jpegs(options.folder, jpegs, options.images)
        subprocess.run(
            [sys.executable, "-m", "prepare.imagenet", jpegs, records], cwd=ROOT, check=True
        )
        runs = [
            (dtype, seed)
            for seed in range(1, options.seeds + 1)
            for dtype in ("float32", "bfloat16")
        ]
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            found = dict(
                zip(runs, pool.map(lambda run: train(records, *run, options.epochs), runs))
            )
    for dtype in ("float32", "bfloat16"):
        values = [value for run, value in found.items() if run[0] == dtype]
        each = " ".join(f"{value:.4f}" for value in values)
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        print(f"{dtype:8} {each}  mean {mean:.4f} ({deviation:.4f})")


if __name__ == "__main__":
    main()
