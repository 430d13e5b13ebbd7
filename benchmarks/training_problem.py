# SPDX-License-Identifier: Apache-2.0
"""A training problem of 100 steps that every implementation can start in the same state.

gpu_training.py trains it with this project, training_reference.py with PyTorch in float64. Images
and initial weights come from numpy and are exact in float16, so that all precisions start equal.
"""

import json
import pathlib

import numpy as np

STEPS, BATCH, CLASSES, PIXELS = 100, 16, 10, 64
# Those of ResNet-50 divided by 4: a step takes a sixteenth of the time.
STEM_FILTERS, STAGE_FILTERS = 16, (16, 32, 64, 128)
STEPS_PER_EPOCH = 10
SETTINGS = {  # of mxresnet.config.Config
    "image_shape": (4, PIXELS, PIXELS),
    "resize": PIXELS,
    "batch_size": BATCH,
    "optimizer": "sgdwfastlars",
    "lr": 0.6,
    "wd": 5e-5,
    "lr_step_epochs": "pow2",
    "warmup_epochs": 2,
    "num_epochs": STEPS // STEPS_PER_EPOCH + 1,
    "label_smoothing": 0.1,
}
LOSSES_FILE = pathlib.Path(__file__).with_name("training_losses.json")
_TEMPLATE_PIXELS = 8
_NOISE = 1.0
_LAST_GAMMA = 0.1


def images_and_labels():
    """Return the images and labels of one epoch, by step.

    An image is the pattern of its class and noise. The fourth channel is 0.

    Returns:
        Images of shape (STEPS_PER_EPOCH, BATCH, 4, PIXELS, PIXELS), float32, and labels of shape
        (STEPS_PER_EPOCH, BATCH).
    """
    random = np.random.RandomState(0)
    scale = PIXELS // _TEMPLATE_PIXELS
    small = random.randn(CLASSES, 3, _TEMPLATE_PIXELS, _TEMPLATE_PIXELS)
    patterns = np.kron(small, np.ones((scale, scale)))
    labels = random.randint(0, CLASSES, (STEPS_PER_EPOCH, BATCH))
    images = np.zeros((STEPS_PER_EPOCH, BATCH, 4, PIXELS, PIXELS), np.float16)
    noise = random.randn(STEPS_PER_EPOCH, BATCH, 3, PIXELS, PIXELS)
    images[:, :, :3] = patterns[labels] + _NOISE * noise
    return images.astype(np.float32), labels


def initial_weights(shapes):
    """Return the first value of each parameter, float32.

    The last gamma of each residual unit is small: at 1, an untrained ResNet-50 amplifies rounding
    errors so much that its losses cannot be compared.

    Args:
        shapes: Shape of each parameter by name, convolutions as (O, I, H, W).
    """
    random = np.random.RandomState(1)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name == "fc1_weight":
            value = 0.01 * random.randn(*shape)
        elif name.endswith("weight"):
            value = np.sqrt(2 / np.prod(shape[1:])) * random.randn(*shape)
        elif name.endswith("gamma"):
            value = np.full(shape, _LAST_GAMMA if "bn3" in name else 1.0)
        else:
            value = np.zeros(shape)
        weights[name] = value.astype(np.float16).astype(np.float32)
    return weights


def smoothed_targets(labels):
    """Return the distribution over the classes that the loss compares with, (images, CLASSES)."""
    smoothing = SETTINGS["label_smoothing"]
    targets = np.full((len(labels), CLASSES), smoothing / (CLASSES - 1))
    targets[np.arange(len(labels)), labels] = 1 - smoothing
    return targets


def read_expected():
    """Return the content of LOSSES_FILE: see training_reference.py."""
    return json.loads(LOSSES_FILE.read_text())
