# SPDX-License-Identifier: Apache-2.0
"""The input pipeline beside bare DALI: python benchmarks/input.py [--threads 2] [--batch 32] [--rounds 15] [--batches 10] [--gpu]

Two live processes read the same records in turn, so that a noisy neighbour meets both: `dali` runs the training pipeline's
DALI graph on the CPU and leaves its output where DALI put it, `mxresnet` is the program's own Train.batches(), which hands it to
MXNet. The records are photographs (crops of the two that scikit-learn brings, 500 x 375, about ImageNet's size).
Prints images/s and the ratio of the two, medians and quartiles.

--gpu puts DALI's graph on GPU 0 (float16, channels last, no MXNet) beside the one on the CPU instead, after comparing the pixels
that the two make of the validation images: mean difference in steps of 8 bits. NOT RUN yet: there was no GPU.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

import step

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
WIDTH, HEIGHT = 500, 375
PHOTOGRAPHS = 256
CLASSES = 8
FILLED = 5  # batches that may have been made while the other had its turn
ALIKE = 4  # steps of 8 bits: decoders interpolate colours differently; a wrong order of channels or scale is far above


def make(folder):
    """Records of PHOTOGRAPHS images, by way of prepare."""
    import cv2
    import numpy as np
    import sklearn.datasets

    images = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    random, scenes = (
        np.random.RandomState(0),
        [cv2.imread(str(path)) for path in sorted(images.glob("*.jpg"))],
    )
    for number in range(PHOTOGRAPHS):
        scene = scenes[number % len(scenes)]
        top, left = random.randint(scene.shape[0] - HEIGHT), random.randint(scene.shape[1] - WIDTH)
        for half in ("train", "val"):
            place = folder / "jpegs" / half / f"class_{number % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(
                str(place / f"{number}.jpg"),
                scene[top : top + HEIGHT, left : left + WIDTH],
                [cv2.IMWRITE_JPEG_QUALITY, 90],
            )
    subprocess.run(
        [sys.executable, "-m", "prepare.imagenet", folder / "jpegs", folder / "records"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "records"


def configured(records, options, gpu):
    """A configuration and its files; on a GPU in the types and layouts of the GPU configurations."""
    from mxresnet.config import Config

    types = {"dtype": "float16", "input_layout": "NHWC"} if gpu else {}
    config = Config(
        data_root=str(records),
        image_shape=(4, 224, 224),
        batch_size=options.batch,
        dali_threads=options.threads,
        dali_roi_decode=1,
        num_examples=PHOTOGRAPHS,
        num_val_examples=PHOTOGRAPHS,
        num_classes=CLASSES,
        **types,
    )
    return config, {
        name: config.path(name)
        for name in ("data_train", "data_train_idx", "data_val", "data_val_idx")
    }


def reader(kind, options):
    """A function that reads so many batches."""
    from mxresnet.data import loader

    config, paths = configured(options.records, options, kind == "gpu")
    backend = loader.load_backend(config)
    if kind != "mxresnet":
        graph = backend.build(
            config, paths, 0, 1, 0 if kind == "gpu" else None, seed=1, training=True
        )
        return lambda batches: [graph.run() and None for _ in range(batches)]
    import mxnet as mx

    train = loader.TrainLoader(
        backend(config, paths, 0, 1, mx.cpu(), seed=1, training=True), options.batch, 1
    )
    return lambda batches: [None for _ in train.batches(batches)]


def difference(records, options, device_id):
    """Mean difference of the validation pixels on a device to those on the CPU, and between labels, in steps of 8 bits."""
    import numpy as np

    from mxresnet.data import loader

    config, paths = configured(records, options, gpu=True)
    backend = loader.load_backend(config)
    here, there = (
        backend.build(config, paths, 0, 1, device, seed=1, training=False)
        for device in (None, device_id)
    )
    pixels, labels = [], []
    for _ in range(PHOTOGRAPHS // options.batch):
        (image, label), (other, other_label) = here.run(), there.run()
        other = other.as_cpu() if hasattr(other, "as_cpu") else other
        image, other = (
            np.asarray(output.as_tensor()).astype(np.float32) for output in (image, other)
        )
        pixels.append(np.abs(image - other)[..., :3].mean(axis=(0, 1, 2)) * backend.STD)
        labels.append(
            np.abs(np.asarray(label.as_tensor()) - np.asarray(other_label.as_tensor())).max()
        )
    return float(np.mean(pixels)), float(max(labels))


def work(kind, options):
    """A contender's process."""
    read = reader(kind, options)
    read(options.batches)
    step.serve(lambda: read(options.batches), first=lambda: read(FILLED))


def contender(kind, options, records):
    command = [
        sys.executable,
        __file__,
        "--work",
        kind,
        "--records",
        records,
        *(
            word
            for name in ("threads", "batch", "batches")
            for word in (f"--{name}", str(getattr(options, name)))
        ),
    ]
    return subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **step.environment("bare", 1)},
    )


def compare_pixels(records, options):
    try:
        pixels, labels = difference(records, options, device_id=0)
    except RuntimeError as error:
        raise SystemExit(
            f"DALI's graph does not run on GPU 0: {str(error).strip().splitlines()[0]}"
        )
    print(
        f"GPU and CPU: validation pixels differ by {pixels:.2f} steps of 8 bits on average, labels by {labels:.0f}"
    )
    if pixels > ALIKE or labels:
        raise SystemExit("the two are not the same pipeline")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("threads", 2), ("batch", 32), ("rounds", 15), ("batches", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--work", choices=["dali", "mxresnet", "gpu"], help=argparse.SUPPRESS)
    parser.add_argument("--records", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options)
    own = "gpu" if options.gpu else "mxresnet"
    with tempfile.TemporaryDirectory() as scratch:
        records = make(pathlib.Path(scratch))
        if options.gpu:
            compare_pixels(records, options)
        processes = {kind: contender(kind, options, records) for kind in ("dali", own)}
        for process in processes.values():
            step.answer(process, "ready")
        seconds = step.take_turns(processes, options.rounds)[0]
        size = (records / "train.rec").stat().st_size / PHOTOGRAPHS
        for process in processes.values():
            process.kill()
    images = options.batch * options.batches
    print(
        f"{options.threads} threads, batch {options.batch}, {options.rounds} rounds of {options.batches} batches, {size / 1000:.0f} kB an image"
    )
    for kind, values in seconds.items():
        print(f"{kind:8} {step.quartiles([images / value for value in values])} images/s")
    print(
        f"{own} reads at {step.quartiles([bare / other for bare, other in zip(seconds['dali'], seconds[own])])} of dali's speed"
    )


if __name__ == "__main__":
    main()
