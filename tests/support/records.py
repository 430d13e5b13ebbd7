# SPDX-License-Identifier: Apache-2.0
"""Small record files and the data loaders that read them."""

import mxnet as mx
import numpy as np

from mxresnet.config import Config
from mxresnet.data import loader
from mxresnet.data.dataset import DataSet
from mxresnet.parallel.world import World

CLASSES = 1000
SETTINGS = {
    "image_shape": (3, 32, 32),
    "resize": 32,
    "batch_size": 8,
    "dali_threads": 1,
    "rand_mirror": False,
}
ONE_RANK = World()


def random_images(count, height=32, width=32):
    random = np.random.RandomState(1)
    return [random.randint(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def write_records(folder, train, val):
    """Write train.rec, val.rec and their indices; the labels are 0, 1, 2, ...

    Args:
        train, val: lists of uint8 images of shape (height, width, 3), in BGR order.
    """
    for prefix, images in (("train", train), ("val", val)):
        write_record_file(folder, prefix, pack_images(images, range(len(images))))


def pack_images(images, labels):
    """Return the content of a record for each image; a label may be a list of labels."""
    header = mx.recordio.IRHeader
    return [
        mx.recordio.pack_img(header(0, label, number, 0), image, quality=100)
        for number, (image, label) in enumerate(zip(images, labels))
    ]


def write_record_file(folder, prefix, packed):
    writer = mx.recordio.MXIndexedRecordIO(
        str(folder / f"{prefix}.idx"), str(folder / f"{prefix}.rec"), "w"
    )
    for number, record in enumerate(packed):
        writer.write_idx(number, record)
    writer.close()


def make_loaders(config, train_examples, val_examples, world=ONE_RANK, seed=5, **state):
    """Return the loaders of one rank, not opened yet; state: arguments saves_state and state."""
    dataset = DataSet(train_examples, val_examples, CLASSES, has_manifests=False)
    backend = loader.load_backend(config)
    return loader.DataLoaders(backend, config, dataset, world, mx.cpu(), seed, **state)


def open_loaders(folder, train_examples, val_examples, world=ONE_RANK, **settings):
    """Return (train loader, validation loader) of one rank."""
    config = Config(data_root=str(folder), **{**SETTINGS, **settings})
    return make_loaders(config, train_examples, val_examples, world).open()


def labels_of(batches):
    """Return the labels of the images that count, as integers."""
    return [int(label) for batch in batches for label in batch.label.asnumpy()[: batch.num_valid]]
