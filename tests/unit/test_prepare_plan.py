# SPDX-License-Identifier: Apache-2.0
"""Order, classes, validation labels, ImageNet's counts, and planning at ImageNet's size."""

import gzip
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from support import image_trees as trees

from prepare import cpus, imagenet_spec, val_labels
from prepare.listing import Folder, Listing, SourceError
from prepare.plan import make_plan, record_order
from prepare.progress_bar import Progress


def plan_of(folders, prefix="train"):
    """A plan of {folder: names}, every image 100 bytes."""
    listing = Listing("top")
    for path, names in folders.items():
        folder = Folder(path)
        for name in names:
            folder.add(name, 100)
        listing.folders.append(folder)
    return make_plan(prefix, listing)


@pytest.mark.parametrize(
    "count,begins",
    [
        (8, [0, 4, 7, 5, 1, 6, 3, 2]),
        (10, [4, 0, 5, 9, 3, 1, 6, 8, 7, 2]),
        (50000, [11251, 5926, 43812, 19737, 21514]),
        (1281167, [636970, 402111, 277585, 988818, 893467]),
    ],
)
def test_order_is_im2recs(count, begins):
    order = record_order(count)
    assert order[: len(begins)].tolist() == begins
    assert len(order) == count


def test_labels_count_folders_with_images_in_walk_order():
    plan = plan_of(
        {
            "b": ["1.jpg"],
            "a/z": ["2.jpg"],
            "": ["0.jpg"],
            "a": [],
            "b-": ["3.jpg"],
            "b/c": ["4.jpg"],
        }
    )
    assert plan.classes == [".", "a/z", "b", "b/c", "b-"]


def test_planning_imagenet_takes_seconds_and_little_memory():
    program = """
import re, time
from prepare.listing import Folder, Listing
from prepare.plan import make_plan, record_order
from prepare.progress_bar import Progress
listing = Listing("top")
for number in range(1000):
    folder = Folder("n%08d" % number, archive="archive.tar")
    for image in range(1281 + (number < 167)):
        folder.add("n%08d_%d.JPEG" % (number, image), 100000 + image, 512 * image)
    listing.folders.append(folder)
start = time.perf_counter()
plan = make_plan("train", listing)
pieces = plan.pieces()
assert len(plan.paths) == 1281167 and pieces[-1][1] == 1281167
# Not ru_maxrss, which remembers the size of the process that this one was forked from.
peak_kib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
print(time.perf_counter() - start, peak_kib / 1024)
"""
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=trees.REPOSITORY, stdout=subprocess.PIPE, check=True
    ).stdout
    seconds, megabytes = map(float, output.split())
    assert seconds < 30 and megabytes < 500


def imagenet_plan(prefix, count_of):
    # The digest is all that is kept of the 1,000 names, so the test makes its own set of classes ImageNet's.
    names = ["n%08d" % number for number in range(1000)]
    return plan_of(
        {
            name: ["%s_%d.JPEG" % (name, image) for image in range(count_of(number))]
            for number, name in enumerate(names)
        },
        prefix,
    )


def test_counts_are_checked_when_the_classes_are_imagenets(monkeypatch):
    plan = imagenet_plan("val", lambda number: 50 if number else 49)
    assert imagenet_spec.image_count_problems(plan, {}) == []
    monkeypatch.setattr(imagenet_spec, "is_imagenet", lambda classes: True)
    reasons = [str(problem) for problem in imagenet_spec.image_count_problems(plan, {})]
    assert reasons == [
        "top: ImageNet has 50000 images here, this has 49999",
        "top/n00000000: ImageNet has 50 images in this class, this has 49",
    ]
    assert imagenet_spec.image_count_problems(imagenet_plan("val", lambda number: 50), {}) == []
    reasons = [
        str(problem)
        for problem in imagenet_spec.image_count_problems(
            imagenet_plan("train", lambda number: 3), {"n00000007": 4, "n00000008": 3}
        )
    ]
    assert reasons == [
        "top: ImageNet has 1281167 images here, this has 3000",
        "top/n00000007: ImageNet has 4 images in this class, this has 3",
    ]


def test_training_counts_come_from_the_devkit(source):
    assert val_labels.train_counts(
        [str(source / "archives" / KINDS[kind]) for kind in KINDS]
    ) == dict.fromkeys(CLASSES, 7)
    assert val_labels.train_counts([str(source / "archives" / "valprep.sh")]) == {}


CLASSES = ["n01440764", "n01443537", "n02085620"]


@pytest.fixture
def source(tmp_path):
    """Class folders, and the official archives with all three sorts of validation labels."""
    files = {
        path: content
        for path, content in trees.small(classes=CLASSES).items()
        if path.startswith("train")
    }
    for number in range(1, 13):
        files["val/%s/ILSVRC2012_val_%08d.JPEG" % (CLASSES[number * 7 % 5 % 3], number)] = (
            trees.jpeg(b"%d" % number)
        )
    trees.write(tmp_path / "folders", files)
    trees.official(
        tmp_path / "folders", tmp_path / "archives", labels=("valprep.sh", "list", "devkit")
    )
    return tmp_path


KINDS = {
    "valprep.sh": "valprep.sh",
    "list": "imagenet_2012_validation_synset_labels.txt",
    "devkit": "ILSVRC2012_devkit_t12.tar.gz",
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("given", [False, True])
def test_each_source_of_labels(source, kind, given):
    for other, name in KINDS.items():
        if other != kind:
            os.remove(str(source / "archives" / name))
    options = []
    if given:
        shutil.move(str(source / "archives" / KINDS[kind]), str(source / "labels"))
        options = ["--val-labels", source / "labels"]
    for place, more in (("folders", []), ("archives", options)):
        result = trees.prepare(source / place, source / ("from " + place), *more)
        assert result.returncode == 0, result.stderr
    assert trees.contents(source / "from archives") == trees.contents(source / "from folders")


def test_flat_validation_folder_and_folder_of_class_archives(source):
    mixed = source / "mixed"
    (mixed / "train").mkdir(parents=True)
    subprocess.run(
        [
            "tar",
            "-xf",
            str(source / "archives" / "ILSVRC2012_img_train.tar"),
            "-C",
            str(mixed / "train"),
        ],
        check=True,
    )
    (mixed / "val").mkdir()
    subprocess.run(
        [
            "tar",
            "-xf",
            str(source / "archives" / "ILSVRC2012_img_val.tar"),
            "-C",
            str(mixed / "val"),
        ],
        check=True,
    )
    subprocess.run(
        [
            "tar",
            "-xzf",
            str(source / "archives" / "ILSVRC2012_devkit_t12.tar.gz"),
            "-C",
            str(mixed),
        ],
        check=True,
    )
    for place in ("folders", "mixed"):
        result = trees.prepare(source / place, source / ("from " + place))
        assert result.returncode == 0, result.stderr
    assert trees.contents(source / "from mixed") == trees.contents(source / "from folders")
    result = trees.prepare(
        source / "from mixed", "--against", source / "folders", module="prepare.verify"
    )
    assert result.returncode == 0, result.stderr


def test_labels_that_disagree(source):
    path = source / "archives" / KINDS["list"]
    lines = path.read_text().splitlines()
    lines[4] = next(name for name in CLASSES if name != lines[4])
    path.write_text("\n".join(lines))
    result = trees.prepare(source / "archives", source / "out")
    assert result.returncode == 1 and "ILSVRC2012_val_00000005.JPEG" in result.stderr
    shutil.copy(str(path), str(source / "folders"))
    result = trees.prepare(source / "folders", source / "out")
    assert result.returncode == 1 and "ILSVRC2012_val_00000005.JPEG" in result.stderr
    assert not (source / "out").exists()


def test_no_labels(source):
    for name in KINDS.values():
        os.remove(str(source / "archives" / name))
    result = trees.prepare(source / "archives", source / "out")
    assert (
        result.returncode == 1
        and "--val-labels" in result.stderr
        and len(result.stderr.splitlines()) == 1
    )


def test_a_missing_validation_image_does_not_move_the_others_labels(source):
    folder = source / "val"
    folder.mkdir()
    subprocess.run(
        ["tar", "-xf", str(source / "archives" / "ILSVRC2012_img_val.tar"), "-C", str(folder)],
        check=True,
    )
    os.remove(str(folder / "ILSVRC2012_val_00000003.JPEG"))
    trees.pack(
        "python",
        "ustar",
        source / "archives" / "ILSVRC2012_img_val.tar",
        folder,
        sorted(os.listdir(str(folder))),
    )
    result = trees.prepare(source / "archives", source / "out")
    assert result.returncode == 1 and "ILSVRC2012_val_00000003.JPEG: does not exist" in result.stderr
    assert trees.prepare(source / "archives", source / "out", "--on-error=skip").returncode == 0
    for line in (source / "out" / "val.lst").read_text().splitlines():
        _, label, path = line.split("\t")
        assert (source / "folders" / "val" / path).exists() and CLASSES[
            int(float(label))
        ] == path.split("/")[0]


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "it is empty"),
        (b"n01440764\nn01 443537\n", "one synset a line"),
        (b"\xff\xfe\x00", "neither"),
        (gzip.compress(b"no archive"), "neither"),
        (b"mv a.JPEG\n", "not a line `mv IMAGE CLASS/`"),
        (b"mv a.JPEG n1/\nmv a.JPEG n2/\n", "to n1 and to n2"),
        (b"mv a.JPEG n1/\nmv it's n02/\n", "not a line `mv IMAGE CLASS/`: mv it's n02/"),
    ],
)
def test_bad_label_files(tmp_path, content, reason):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(SourceError, match=reason):
        val_labels.read_label_file(str(tmp_path / "labels"))


def test_usable_cpus_follow_the_control_group(tmp_path):
    here = len(os.sched_getaffinity(0))
    (tmp_path / "membership").write_text("0::/pod/container\n")
    (tmp_path / "pod" / "container").mkdir(parents=True)
    (tmp_path / "pod" / "container" / "cpu.max").write_text("max 100000\n")
    assert cpus.usable_cpus(str(tmp_path), str(tmp_path / "membership")) == here
    (tmp_path / "pod" / "cpu.max").write_text("50000 100000\n")
    assert cpus.usable_cpus(str(tmp_path), str(tmp_path / "membership")) == 1
    (tmp_path / "membership").write_text("4:cpu,cpuacct:/docker/x\n1:name=systemd:/\n")
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpus.usable_cpus(str(tmp_path), str(tmp_path / "membership")) == 1
    assert cpus.usable_cpus(str(tmp_path), str(tmp_path / "nothing")) == here


def test_pieces_hold_every_record_once():
    plan = plan_of({"a": ["%d.jpg" % number for number in range(1000)]})
    plan.sizes = np.array([5 << 20, 1, 0, 4 << 20] * 250)
    edges = plan.pieces()
    assert edges[0][0] == 0 and edges[-1][1] == 1000
    assert all(first < last == following for (first, last), (following, _) in zip(edges, edges[1:]))


def test_progress_in_a_log_is_plain_lines(monkeypatch):
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("prepare.progress_bar.time.monotonic", lambda: clock[0])
    with Progress("train", 400, 4000000, stream) as progress:
        for _ in range(4):
            clock[0] += 6
            progress(100, 1000000)
    assert stream.getvalue() == (
        "train: 200 of 400 images, 0.00 of 0.00 GB, 0 MB/s, 17 images/s, 12 s left\n"
        "train: 400 of 400 images, 0.00 of 0.00 GB, 0 MB/s, 17 images/s, 0 s left\n"
    )
