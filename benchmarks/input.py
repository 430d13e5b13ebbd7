# SPDX-License-Identifier: Apache-2.0
"""Compare the input pipeline with bare DALI.

    python benchmarks/input.py [--threads 2] [--batch 32] [--rounds 15] [--batches 10] [--gpu]
        [--records DIR]
    python benchmarks/input.py --make-records DIR

Two processes read the same records in turn, so that other load on the machine affects both.
`dali` runs the DALI graph of the training pipeline on the CPU and leaves its output in DALI's
memory. `mxresnet` is TrainLoader.batches(), which also passes the output to MXNet. The records are
photographs of about ImageNet's size: crops of 500 x 375 pixels from scikit-learn's two images.
Prints images/s of both and their ratio, as medians and quartiles.

With --gpu, DALI's graph on GPU 0 (float16, channels last, no MXNet) replaces `mxresnet`. The
program then first compares the pixels that both graphs make of the validation images, and prints
the mean difference in 8-bit steps. --gpu has not been run on a GPU yet.
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
# Batches that a process may have prefetched during the other's turn. They are read untimed.
PREFETCHED_BATCHES = 5
# In 8-bit steps. Decoders interpolate colours differently; with wrong channels or scales the
# difference would be larger.
MAX_PIXEL_DIFFERENCE = 4


def make_records(folder):
    """Write PHOTOGRAPHS images, convert them with prepare, and return the records' folder."""
    import cv2
    import numpy as np
    import sklearn.datasets

    images = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    random = np.random.RandomState(0)
    scenes = [cv2.imread(str(path)) for path in sorted(images.glob("*.jpg"))]
    for number in range(PHOTOGRAPHS):
        scene = scenes[number % len(scenes)]
        top, left = random.randint(scene.shape[0] - HEIGHT), random.randint(scene.shape[1] - WIDTH)
        for split in ("train", "val"):
            class_folder = folder / "jpegs" / split / f"class_{number % CLASSES}"
            class_folder.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(
                str(class_folder / f"{number}.jpg"),
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


def make_config(records, options, on_gpu):
    """Return the settings; on a GPU with the types and layouts of the GPU configurations."""
    from mxresnet.config import Config

    types = {"dtype": "float16", "input_layout": "NHWC"} if on_gpu else {}
    return Config(
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


def make_shard(config, training):
    """Return the whole training or validation records as the shard of one rank."""
    from mxresnet.data.shard import RecordShard

    name = "data_train" if training else "data_val"
    records, index = config.path(name), config.path(f"{name}_idx")
    return RecordShard(
        training, records, index, records, 0, 1, config.batch_size, config.num_classes, seed=1
    )


def make_reader(kind, options):
    """Return a function that reads a number of batches."""
    from mxresnet.data import dali_graph

    config = make_config(options.records, options, kind == "gpu")
    shard = make_shard(config, training=True)
    if kind != "mxresnet":
        pipeline = dali_graph.build_pipeline(config, shard, 0 if kind == "gpu" else None)

        def read_with_dali(batches):
            for _ in range(batches):
                pipeline.run()

        return read_with_dali
    import mxnet as mx

    from mxresnet.data import dali, loader

    iterator = dali.DaliIterator(config, shard, mx.cpu())
    train = loader.TrainLoader(iterator, options.batch, multiplier=1)

    def read_with_loader(batches):
        for _ in train.batches(batches):
            pass

    return read_with_loader


def compare_validation(records, options, device_id):
    """Compare the validation batches of a GPU with those of the CPU.

    Returns:
        The mean difference of the pixels in 8-bit steps, and the largest difference of the labels.
    """
    import numpy as np

    from mxresnet.data import dali_graph

    config = make_config(records, options, on_gpu=True)
    shard = make_shard(config, training=False)
    on_cpu, on_gpu = (
        dali_graph.build_pipeline(config, shard, device) for device in (None, device_id)
    )
    pixels, labels = [], []
    for _ in range(PHOTOGRAPHS // options.batch):
        (image, label), (other, other_label) = on_cpu.run(), on_gpu.run()
        other = other.as_cpu() if hasattr(other, "as_cpu") else other
        image, other = (
            np.asarray(output.as_tensor()).astype(np.float32) for output in (image, other)
        )
        pixels.append(np.abs(image - other)[..., :3].mean(axis=(0, 1, 2)) * dali_graph.STD)
        labels.append(
            np.abs(np.asarray(label.as_tensor()) - np.asarray(other_label.as_tensor())).max()
        )
    return float(np.mean(pixels)), float(max(labels))


def work(kind, options):
    """Run one contender in this process: read batches whenever the parent requests a turn."""
    read = make_reader(kind, options)
    read(options.batches)
    step.serve(lambda: read(options.batches), first=lambda: read(PREFETCHED_BATCHES))


def start_contender(kind, options, records):
    """Start a process that runs work()."""
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
    """Print the differences between GPU 0 and the CPU; exit when they are too large."""
    try:
        pixels, labels = compare_validation(records, options, device_id=0)
    except RuntimeError as error:
        raise SystemExit(
            f"DALI's graph does not run on GPU 0: {str(error).strip().splitlines()[0]}"
        ) from None
    print(
        f"GPU and CPU: validation pixels differ by {pixels:.2f} 8-bit steps on average, labels by "
        f"{labels:.0f}"
    )
    if pixels > MAX_PIXEL_DIFFERENCE or labels:
        raise SystemExit("the GPU and the CPU do not compute the same pixels and labels")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("threads", 2), ("batch", 32), ("rounds", 15), ("batches", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--work", choices=["dali", "mxresnet", "gpu"], help=argparse.SUPPRESS)
    parser.add_argument("--records", help="folder that --make-records has filled")
    parser.add_argument("--make-records", metavar="DIR", help="only make the records, in DIR")
    options = parser.parse_args()
    if options.work:
        work(options.work, options)
        return
    if options.make_records:
        print(make_records(pathlib.Path(options.make_records)))
        return
    own = "gpu" if options.gpu else "mxresnet"
    with tempfile.TemporaryDirectory() as scratch:
        records = pathlib.Path(options.records or make_records(pathlib.Path(scratch)))
        if options.gpu:
            compare_pixels(records, options)
        processes = {kind: start_contender(kind, options, records) for kind in ("dali", own)}
        for process in processes.values():
            step.wait_for_line(process, "ready")
        seconds = step.take_turns(processes, options.rounds)[0]
        size = (records / "train.rec").stat().st_size / PHOTOGRAPHS
        for process in processes.values():
            process.kill()
    images = options.batch * options.batches
    print(
        f"{options.threads} threads, batch {options.batch}, {options.rounds} rounds of "
        f"{options.batches} batches, {size / 1000:.0f} kB an image"
    )
    for kind, values in seconds.items():
        print(f"{kind:8} {step.format_quartiles([images / value for value in values])} images/s")
    ratios = [bare / other for bare, other in zip(seconds["dali"], seconds[own])]
    print(f"{own} reads at {step.format_quartiles(ratios)} of dali's speed")


if __name__ == "__main__":
    main()
