# SPDX-License-Identifier: Apache-2.0
"""MXNet and DALI read the records that prepare.imagenet writes; DALI checks images with --check."""

import json
import os
import shutil

import pytest
from support import image_fixtures as images
from support.image_fixtures import MAGIC, jpeg


def read_list(folder, split="train"):
    """Return (key, label, path) of each record."""
    rows = [line.split("\t") for line in (folder / f"{split}.lst").read_text().splitlines()]
    return [(int(key), float(label), path) for key, label, path in rows]


def test_mxnet_reads_every_record(tmp_path):
    mx = pytest.importorskip("mxnet")
    files = images.small_dataset(train=30)
    files["train/n01440764/split.JPEG"] = jpeg(b"pp" + MAGIC * 3 + b"xyz" + MAGIC)
    files["train/n01440764/split at the end.JPEG"] = jpeg(b"pp" + b"ab" + MAGIC)
    images.write_files(tmp_path / "in", files)
    assert images.run_prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    for split in ("train", "val"):
        base = str(tmp_path / "out" / split)
        reader = mx.recordio.MXIndexedRecordIO(base + ".idx", base + ".rec", "r")
        for key, label, path in read_list(tmp_path / "out", split):
            header, image = mx.recordio.unpack(reader.read_idx(key))
            assert (header.label, header.id) == (label, key)
            assert image == (tmp_path / "in" / split / path).read_bytes()


@pytest.fixture(scope="module")
def grey_images(tmp_path_factory):
    """Real JPEGs of one grey level each, 20 * number, so that decoded pixels identify the image."""
    cv2 = pytest.importorskip("cv2")
    np = pytest.importorskip("numpy")
    folder = tmp_path_factory.mktemp("grey")
    files = {}
    for split in ("train", "val"):
        for number in range(12):
            image = np.full((40, 40, 3), 20 * number, np.uint8)
            _, content = cv2.imencode(".jpg", image)
            files[f"{split}/c{number % 3}/{number}.jpg"] = content.tobytes()
    images.write_files(folder / "in", files)
    assert images.run_prepare(folder / "in", folder / "out").returncode == 0
    return folder


def expected_labels_and_levels(folder):
    """Return (label, grey level) of each training record, in order."""
    rows = read_list(folder / "out")
    return [(label, 20 * int(os.path.basename(path)[: -len(".jpg")])) for _, label, path in rows]


def test_image_record_iter_reads_every_record(grey_images):
    mx = pytest.importorskip("mxnet")
    base = str(grey_images / "out" / "train")
    batches = mx.io.ImageRecordIter(
        path_imgrec=base + ".rec",
        path_imgidx=base + ".idx",
        data_shape=(3, 40, 40),
        batch_size=4,
        preprocess_threads=1,
    )
    found = []
    for batch in batches:
        levels = batch.data[0].asnumpy().mean(axis=(1, 2, 3))
        found += zip(batch.label[0].asnumpy().tolist(), levels.round().tolist())
    assert sorted(found) == sorted(expected_labels_and_levels(grey_images))


def test_dali_reads_every_record(grey_images):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def read(base):
        jpegs, labels = fn.readers.mxnet(path=[base + ".rec"], index_path=[base + ".idx"])
        return fn.decoders.image(jpegs, device="cpu"), labels

    pipeline = read(str(grey_images / "out" / "train"))
    pipeline.build()
    found = []
    for _ in range(3):
        batch, labels = pipeline.run()
        found += [(float(labels.at(at)[0]), round(float(batch.at(at).mean()))) for at in range(4)]
    assert found == expected_labels_and_levels(grey_images)


def test_decode_check_finds_damage_between_the_ends(grey_images, tmp_path):
    pytest.importorskip("nvidia.dali")
    source = tmp_path / "in"
    shutil.copytree(str(grey_images / "in"), str(source))
    images.write_files(source, {"train/c1/scrambled.jpg": jpeg(b"no image at all" * 50)})
    assert images.run_prepare(source, tmp_path / "checked by ends").returncode == 0
    result = images.run_prepare(source, tmp_path / "out", "--check=decode")
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("prepare.imagenet")]
    assert len(lines) == 2 and "train/c1/scrambled.jpg: DALI cannot decode it: " in lines[0]
    skipping = images.run_prepare(source, tmp_path / "out", "--check=decode", "--on-error=skip")
    assert skipping.returncode == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text())["examples"] == 12
