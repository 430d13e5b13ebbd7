# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: MXNet's own readers, damage, and what is never executed."""

import os
import pickle
import shutil

import mxnet as mx
import numpy as np
import pytest
from support import checkpoints

from mxresnet.checkpoint import arrays, manifest, state, store
from mxresnet.checkpoint.manifest import DamagedError, Position
from mxresnet.errors import UserError
from mxresnet.model import portable


@pytest.fixture(scope="module")
def module():
    return checkpoints.bound_module()


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    """A checkpoint of a network on two ranks."""
    network, ranks = checkpoints.states_of(module, ranks=2)
    symbol = portable.symbol_json(checkpoints.CONFIG, checkpoints.CLASSES)
    return checkpoints.publish(tmp_path_factory.mktemp("run"), network, ranks, symbol=symbol)


@pytest.fixture
def tiny(tmp_path):
    """The folder of a run with three tiny checkpoints; the first one is the best."""
    for epoch, accuracy in ((1, 0.5), (2, 0.25), (3, None)):
        changes = {"position": Position(epoch, 7), "accuracy": accuracy}
        checkpoints.publish(tmp_path, *checkpoints.tiny_states(), **changes)
    return tmp_path


def probabilities(network):
    data = mx.nd.array(np.random.RandomState(1).rand(2, 3, 32, 32))
    network.forward(mx.io.DataBatch([data], [mx.nd.zeros(2)]), is_train=False)
    return network.get_outputs()[0].asnumpy()


def expected_probabilities(module):
    """Return the output with the statistics averaged over the ranks, which are 0 and 1 higher."""
    weights, statistics = module.get_params()
    other = checkpoints.bound_module()
    other.set_params(weights, {name: array + 0.5 for name, array in statistics.items()})
    return probabilities(other)


def test_module_load_reads_it(module, checkpoint):
    loaded = mx.mod.Module.load(os.path.join(checkpoint, "model"), 0)
    loaded.bind([("data", (2, 3, 32, 32))], [("softmax_label", (2,))], for_training=False)
    loaded.init_params()
    np.testing.assert_array_equal(probabilities(loaded), expected_probabilities(module))


def test_gluon_reads_it(module, checkpoint):
    block = mx.gluon.SymbolBlock.imports(
        os.path.join(checkpoint, "model-symbol.json"),
        ["data", "softmax_label"],
        os.path.join(checkpoint, "model-0000.params"),
    )
    data = mx.nd.array(np.random.RandomState(1).rand(2, 3, 32, 32))
    output = block(data, mx.nd.zeros(2)).asnumpy()
    np.testing.assert_allclose(output, expected_probabilities(module), rtol=1e-5)


def test_the_params_file_is_that_of_mxnet_byte_for_byte(tmp_path):
    content = {
        "arg:w": np.random.rand(3, 4, 2).astype("f4"),
        "aux:m": np.arange(5, dtype="f4"),
        "x": np.arange(4, dtype="u1"),
        "half": np.arange(4, dtype="f2").reshape(2, 2),
    }
    arrays.write_params(str(tmp_path / "own"), content)
    nd = {name: mx.nd.array(array, dtype=array.dtype) for name, array in content.items()}
    mx.nd.save(str(tmp_path / "mxnet"), nd)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "mxnet").read_bytes()
    for name, array in arrays.read_params(str(tmp_path / "mxnet")).items():
        np.testing.assert_array_equal(array, content[name])


@pytest.mark.parametrize("channel_last", [False, True])
def test_state_is_read_back(tmp_path, channel_last):
    weight = np.random.rand(2, 3, 4, 5).astype("f4")
    network = state.NetworkState({"w": weight}, {"w": weight + 1}, 9, channel_last)
    _, ranks = checkpoints.tiny_states(2)
    state.write_state(str(tmp_path), "{}", network, ranks)
    read = state.read_network(str(tmp_path), 9, channel_last)
    np.testing.assert_array_equal(read.weights["w"], weight)
    np.testing.assert_array_equal(read.momenta["w"], weight + 1)
    shape = state.read_weights(str(tmp_path))[0]["w"].shape
    assert shape == ((2, 5, 3, 4) if channel_last else (2, 3, 4, 5))
    second = state.read_rank(str(tmp_path), 1)
    assert second.input.values == {"since": 1} and second.own.statistics["m"] == [1]
    state.set_generator_states(second.generators)
    first = np.random.rand(3)
    state.set_generator_states(second.generators)
    np.testing.assert_array_equal(np.random.rand(3), first)


@pytest.mark.parametrize("name", ["optimizer.npz", "rank_0000.npz"])
def test_a_pickle_is_not_loaded(tmp_path, name):
    """numpy.load would execute it; so does no reader of a checkpoint."""

    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DamagedError):
        arrays.read_npz(str(tmp_path / name))
    np.savez(str(tmp_path / name), a=np.array([Trap()], dtype=object))
    with pytest.raises(DamagedError):
        arrays.read_npz(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "removed":
        path.unlink()
    else:
        path.write_bytes(b"")


FILES = [
    "manifest.json",
    "model-symbol.json",
    "model-0000.params",
    "optimizer.npz",
    "rank_0000.npz",
]


@pytest.mark.parametrize("how", ["truncated", "flipped", "removed", "emptied"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found(tiny, name, how):
    path = tiny / "epoch_003_step_000007"
    store.verify(str(path))
    if (name, how) == ("manifest.json", "truncated"):
        (path / name).write_text((path / name).read_text()[:-40])  # the last byte is a line break
    else:
        damage(path / name, how)
    with pytest.raises(DamagedError):
        store.verify(str(path))


@pytest.mark.parametrize("field", ["settings", "data", "versions"])
def test_a_manifest_with_values_of_other_types_is_damaged(tiny, field):
    """Its sum is right: another program wrote it."""
    path = tiny / "epoch_003_step_000007" / "manifest.json"
    content = manifest.parse_json_file(str(path), manifest.FORMAT)
    content["fingerprint"][field] = [1]
    path.write_text(manifest.format_json(manifest.FORMAT, content))
    with pytest.raises(DamagedError, match="is damaged"):
        store.verify(str(path.parent))


def test_a_renamed_checkpoint_is_damaged(tiny):
    os.rename(tiny / "epoch_003_step_000007", tiny / "epoch_009_step_000001")
    with pytest.raises(DamagedError, match="is that of epoch_003_step_000007"):
        store.verify(str(tiny / "epoch_009_step_000001"))


def test_newest_first_and_the_best_is_kept(tiny):
    names = [os.path.basename(path) for path in store.list_checkpoints(str(tiny))]
    assert names == [f"epoch_00{epoch}_step_000007" for epoch in (3, 2, 1)]
    newest = checkpoints.publish(tiny, *checkpoints.tiny_states(), position=Position(10, 1))
    store.prune(str(tiny), newest)
    names = [os.path.basename(path) for path in store.list_checkpoints(str(tiny))]
    assert names == ["epoch_010_step_000001", "epoch_003_step_000007", "epoch_001_step_000007"]
    assert store.find_model(str(tiny)).endswith("epoch_001_step_000007")
    assert sorted(path.name for path in tiny.iterdir()) == sorted(names)


def test_nothing_is_left_of_links_and_files_that_are_removed(tiny, tmp_path_factory):
    """What a link leads to stays as it is."""
    other = tmp_path_factory.mktemp("other")
    os.chmod(other, 0o755)
    (tiny / "epoch_001_step_000001").symlink_to(other)
    (tiny / "epoch_001_step_000002").write_text("")
    store.prune(str(tiny), str(tiny / "epoch_003_step_000007"), kept=1)
    names = ["epoch_001_step_000007", "epoch_003_step_000007"]
    assert sorted(path.name for path in tiny.iterdir()) == names
    assert other.is_dir() and other.stat().st_mode & 0o777 == 0o755


def test_a_model_is_found_or_refused(tiny):
    path = str(tiny / "epoch_002_step_000007")
    assert store.find_model(path) == path
    (tiny / "epoch_002_step_000007" / "optimizer.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"optimizer.npz has 0 bytes"):
        store.find_model(path)
    shutil.rmtree(tiny / "epoch_001_step_000007")
    for name in ("empty", "missing"):
        if name == "empty":
            (tiny / name).mkdir()
        with pytest.raises(UserError):
            store.find_model(str(tiny / name))


def test_nothing_is_left_of_a_checkpoint_that_cannot_be_written(tmp_path):
    network, ranks = checkpoints.tiny_states()
    (tmp_path / "run").mkdir()

    def fail(path):
        state.write_state(path, "{}", network, ranks)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        store.publish(str(tmp_path / "run"), Position(1, 1), 100, fail, lambda files: None)
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(OSError, match="MiB free"):
        store.publish(str(tmp_path / "run"), Position(1, 1), 1 << 60, fail, lambda files: None)
