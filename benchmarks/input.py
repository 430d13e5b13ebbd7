# SPDX-License-Identifier: Apache-2.0
"""What stands between DALI and the trainer: python benchmarks/input.py [--threads 2] [--batch 32] [--rounds 15] [--batches 10]

Two live processes read the same records in turn, so that a noisy neighbour meets both: `dali` runs the training pipeline's
DALI graph and leaves its output where DALI put it, `mxresnet` is the program's own Train.batches(), which copies it into MXNet's
arrays. The records are photographs (crops of the two that scikit-learn brings, 500 x 375, about ImageNet's size).
Prints images/s and the ratio of the two, medians and quartiles. CPU only.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import step

ROOT = pathlib.Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 500, 375
PHOTOGRAPHS = 256
CLASSES = 8
FILLED = 5  # batches that may have been made while the other had its turn


def make(folder):
    """Records of PHOTOGRAPHS images, by way of prepare."""
    import cv2
    import numpy as np
    import sklearn.datasets

    images = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    random, scenes = np.random.RandomState(0), [cv2.imread(str(path)) for path in sorted(images.glob("*.jpg"))]
    for number in range(PHOTOGRAPHS):
        scene = scenes[number % len(scenes)]
        top, left = random.randint(scene.shape[0] - HEIGHT), random.randint(scene.shape[1] - WIDTH)
        crop = scene[top:top + HEIGHT, left:left + WIDTH]
        for half in ("train", "val"):
            place = folder / "jpegs" / half / f"class_{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(place / f"{number}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 90])
    subprocess.run(
        [sys.executable, "-m", "prepare.imagenet", folder / "jpegs", folder / "records"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "records"


def reader(kind, options):
    """A function that reads so many batches."""
    from mxresnet import pipeline
    from mxresnet.config import Config

    config = Config(
        data_root=options.records, image_shape=(4, 224, 224), batch_size=options.batch, dali_threads=options.threads,
        dali_roi_decode=1, num_examples=PHOTOGRAPHS, num_val_examples=PHOTOGRAPHS, num_classes=CLASSES)
    backend = pipeline.load(config)
    import mxnet as mx

    paths = {name: config.path(name) for name in ("data_train", "data_train_idx", "data_val", "data_val_idx")}
    stream = backend.Stream(config, paths, 0, 1, mx.cpu(), seed=1, training=True)
    if kind == "dali":
        graph = stream._pipe  # the same graph, built by the same lines
        return lambda batches: [graph.run() and None for _ in range(batches)]
    train = pipeline.Train(stream, options.batch, 1)
    return lambda batches: [None for _ in train.batches(batches)]


def work(kind, options):
    """A contender's process: one turn for each line that comes in, its seconds out."""
    read = reader(kind, options)
    read(options.batches)
    print("ready", flush=True)
    for _ in sys.stdin:
        read(FILLED)
        start = time.perf_counter()
        read(options.batches)
        print("seconds", time.perf_counter() - start, flush=True)


def contender(kind, options, records):
    command = [sys.executable, __file__, "--work", kind, "--records", records, *(
        word for name in ("threads", "batch", "batches") for word in (f"--{name}", str(getattr(options, name))))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **step.environment("bare", 1)}
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 2), ("batch", 32), ("rounds", 15), ("batches", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--work", choices=["dali", "mxresnet"], help=argparse.SUPPRESS)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options)
    with tempfile.TemporaryDirectory() as scratch:
        records = make(pathlib.Path(scratch))
        processes = {kind: contender(kind, options, records) for kind in ("dali", "mxresnet")}
        for process in processes.values():
            step.answer(process, "ready")
        seconds = step.take_turns(processes, options.rounds)[0]
        size = (records / "train.rec").stat().st_size / PHOTOGRAPHS
        for process in processes.values():
            process.kill()
    images = options.batch * options.batches
    print(f"{options.threads} threads, batch {options.batch}, {options.rounds} rounds of {options.batches} batches, {size / 1000:.0f} kB an image")
    for kind, values in seconds.items():
        print(f"{kind:8} {step.quartiles([images / value for value in values])} images/s")
    ratios = [bare / own for bare, own in zip(seconds["dali"], seconds["mxresnet"])]
    print(f"mxresnet reads at {step.quartiles(ratios)} of DALI's own speed")


if __name__ == "__main__":
    main()
