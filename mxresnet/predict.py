# SPDX-License-Identifier: Apache-2.0
"""Classify images with the network of a checkpoint.

    python -m mxresnet.predict CHECKPOINT IMAGE... [--top N] [--json]

CHECKPOINT is the folder of a checkpoint, or of the checkpoints of a run (then the best one is
used). IMAGE is a file or a folder, of which all images are classified. Each image is preprocessed
as in an evaluation. With --json each line of the output is a JSON object:

    {"image": PATH, "predictions": [{"label": 3, "class": "digit_3", "probability": 0.97}, ...]}

The class is null if the data set of the run had no manifest. The exit status is 2 if an image
cannot be read; the others are classified nevertheless.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from mxresnet import saved_model
from mxresnet.errors import ExitStatus, UserError, exit_now
from mxresnet.saved_model import SavedModel, portable
from mxresnet.standard_streams import check_output, prepare_streams


def best_classes(saved: SavedModel, probabilities: np.ndarray, count: int) -> List[Dict[str, Any]]:
    """Return the classes with the highest probabilities, the highest first."""
    labels = np.argsort(-probabilities, kind="stable")[:count]
    names = saved.class_names
    return [
        {
            "label": int(label),
            "class": names[label] if names else None,
            "probability": float(probabilities[label]),
        }
        for label in labels
    ]


def format_lines(path: str, predictions: Sequence[Dict[str, Any]]) -> str:
    """Return the result for an image as lines of text."""
    rows = [f"  {row['probability']:.4f}  {_name(row)}\n" for row in predictions]
    return f"{path}\n" + "".join(rows)


def _name(row: Dict[str, Any]) -> str:
    return f"class {row['label']}" if row["class"] is None else str(row["class"])


def classify(saved: SavedModel, paths: Sequence[str], top: int, as_json: bool) -> ExitStatus:
    """Classify images and print the results.

    Raises:
        UserError: the network, or a folder of images, cannot be used.
    """
    from mxresnet.data.image_file import ImageReader, find_images
    from mxresnet.model.inference import Network

    os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
    images = find_images(paths)
    reader, network = ImageReader(portable(saved.config)), Network(saved)
    status = ExitStatus.SUCCESS
    for path in images:
        try:
            image = reader.read(path)
        except UserError as error:
            _report(error)
            status = ExitStatus.USER_ERROR
            continue
        predictions = best_classes(saved, network.probabilities(image), top)
        if as_json:
            text = saved_model.to_json_line({"image": path, "predictions": predictions})
        else:
            text = format_lines(path, predictions)
        sys.stdout.write(text)
    check_output()
    return status


def _report(error: UserError) -> None:
    sys.stderr.write(f"mxresnet.predict: {error}\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"{message} (python -m mxresnet.predict --help)")


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m mxresnet.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a checkpoint or a run")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or folder of them")
    parser.add_argument("--top", type=int, default=5, help="classes to print (default 5)")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each image")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} must be 1 or more")
    return arguments


def main(argv: Optional[Sequence[str]] = None) -> ExitStatus:
    """Run the command line and return its exit status."""
    try:
        arguments = _parse(argv)
        saved = saved_model.load(arguments.checkpoint)
        return classify(saved, arguments.images, arguments.top, arguments.json)
    except UserError as error:
        _report(error)
        return ExitStatus.USER_ERROR


if __name__ == "__main__":
    prepare_streams()
    exit_now(main())
