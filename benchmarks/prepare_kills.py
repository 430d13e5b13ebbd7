# SPDX-License-Identifier: Apache-2.0
"""Kill conversions at random times until each completes, and compare the bytes.

Usage: python benchmarks/prepare_kills.py [KILLS]

The source of the conversions is alternately class folders and archives. A killed conversion is
started again. When a conversion completes before it is killed, its output is compared with that of
an uninterrupted run, and the next conversion begins.
"""

from __future__ import annotations

import filecmp
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Optional

from prepare_vs_im2rec import ROOT, write_sources

DEFAULT_KILLS = 60
IMAGES, IMAGE_KILOBYTES, CLASSES = 6000, 60, 50
COMMAND = [sys.executable, "-m", "prepare.imagenet"]
FILES = [
    split + suffix for split in ("train", "val") for suffix in (".rec", ".idx", ".lst", ".sums")
]


def convert(source: str, output: str) -> float:
    """Run an uninterrupted conversion; return its seconds."""
    start = time.perf_counter()
    command = [*COMMAND, source, output]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def convert_or_kill(source: str, output: str, kill_after_seconds: Optional[float]) -> bool:
    """Run a conversion and kill it after some time; return False if it completed before that.

    Args:
        source: Folder of the images.
        output: Folder of the records.
        kill_after_seconds: Time until the kill; None: do not kill it.
    """
    command = [*COMMAND, source, output]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        status = process.wait(kill_after_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if status != 0:
        raise RuntimeError(f"prepare.imagenet ended with exit status {status}")
    return False


def check_same_files(expected: str, output: str, kills: int) -> None:
    """Raise RuntimeError unless both folders hold the same data files."""
    for name in FILES:
        if not filecmp.cmp(os.path.join(expected, name), os.path.join(output, name), shallow=False):
            raise RuntimeError(f"{name} differs after {kills} kills")


def run(folder: str, wanted_kills: int) -> None:
    """Kill conversions and compare their output, all in `folder`; then print a summary."""
    write_sources(folder, IMAGES, IMAGE_KILOBYTES, CLASSES)
    expected, output = os.path.join(folder, "expected"), os.path.join(folder, "out")
    uninterrupted_seconds = convert(os.path.join(folder, "folders"), expected)
    generator, kills, completed = random.Random(1), 0, 0
    outputs_at_kill: Counter[str] = Counter()
    while kills < wanted_kills or os.path.exists(output):
        source = os.path.join(folder, ("folders", "archives")[completed % 2])
        seconds = generator.uniform(0.1, uninterrupted_seconds) if kills < wanted_kills else None
        if convert_or_kill(source, output, seconds):
            kills += 1
            names = sorted(os.listdir(output)) if os.path.exists(output) else ["nothing yet"]
            outputs_at_kill[" ".join(names)] += 1
        else:
            check_same_files(expected, output, kills)
            shutil.rmtree(output)
            completed += 1
    print(f"{kills} kills in {completed} conversions, all results byte-identical")
    print("content of the destination when killed:")
    for names_at_kill, count in outputs_at_kill.most_common():
        print(f"{count:4}  {names_at_kill}")


def main() -> None:
    """Run the command line."""
    wanted_kills = int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_KILLS
    folder = tempfile.mkdtemp()
    try:
        run(folder, wanted_kills)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
