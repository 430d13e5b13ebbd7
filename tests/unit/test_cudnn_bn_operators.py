# SPDX-License-Identifier: Apache-2.0
"""Our batch-norm operators, built and loaded for real: the CPU library against numpy and against MXNet's own operators."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import mxnet as mx
import numpy as np
import pytest
from support.commands import python
from test_cudnn_bn_build import inside, package_in, reasons_in

from mxresnet import trainer
from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.run_plan import make_plan
from mxresnet.model.cudnn_bn import build as extension_build
from mxresnet.model.cudnn_bn import runtime
from mxresnet.model.ops import ExtensionOps, PlainOps
from mxresnet.parallel.world import World

OPERATIONS = ["plain", "relu", "add_relu"]


@pytest.fixture(scope="module")
def operators():
    """The CPU library, made by its command and loaded into this process."""
    done = python("-m", "mxresnet.model.cudnn_bn", "build", "--cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(extension_build.library("cpu"))]
    assert runtime.unavailable_reason(mx.cpu()) is None
    return runtime


# The operators


def reference(operation, x, z, gamma, beta, dy, mean, variance, eps, momentum):
    """The step in float64, channels last: by name as runtime.batch_norm's symbol has it."""
    axes, count = (0, 1, 2), x[..., 0].size
    inverse = 1 / np.sqrt(x.var(axes) + eps)
    normal = (x - x.mean(axes)) * inverse
    y = normal * gamma + beta + (z if operation == "add_relu" else 0)
    through = dy * ((y > 0) | (operation == "plain"))
    found = {
        "output": y if operation == "plain" else np.maximum(y, 0),
        "bn_gamma": (through * normal).sum(axes),
        "bn_beta": through.sum(axes),
        "data": gamma
        * inverse
        * (through - through.mean(axes) - normal * (through * normal).mean(axes)),
        "bn_moving_mean": momentum * mean + (1 - momentum) * x.mean(axes),
        "bn_moving_var": momentum * variance + (1 - momentum) * x.var(axes) * count / (count - 1),
    }
    return {**found, "addend": through} if operation == "add_relu" else found


def make(operation, channels, layout, **attributes):
    addend = mx.sym.var("addend") if operation == "add_relu" else None
    return runtime.batch_norm(
        mx.sym.var("data"),
        "bn",
        channels,
        layout=layout,
        relu=operation == "relu",
        addend=addend,
        **attributes,
    )


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (1, 9, 2, 17), (4, 3, 3, 64)])
def test_an_operator_equals_numpy(operators, operation, layout, shape):
    random = np.random.RandomState(sum(shape))
    channels = shape[3]
    x, z, dy = (random.randn(*shape) * 3 + 5 for _ in range(3))
    gamma, beta, mean = (random.randn(channels) for _ in range(3))
    gamma[0], variance = 0, random.rand(channels) + 0.5
    expected = reference(operation, x, z, gamma, beta, dy, mean, variance, 1e-3, 0.7)
    turned = (lambda a: a.transpose(0, 3, 1, 2)) if layout == "NCHW" else (lambda a: a)
    symbol = make(operation, channels, layout, eps=1e-3, momentum=0.7)
    arrays = dict(bn_gamma=gamma, bn_beta=beta, bn_moving_mean=mean, bn_moving_var=variance)
    arrays.update(data=turned(x), addend=turned(z), head=turned(dy))
    found = runtime._step(symbol, mx.cpu(), arrays, "float32")
    assert set(found) == set(expected)
    for name, value in expected.items():
        value = turned(value) if value.ndim == 4 else value
        # Two values a channel have a gradient of next to nothing, by cancellation.
        np.testing.assert_allclose(
            found[name], value, rtol=1e-4, atol=2e-5 * max(1, abs(value).max()), err_msg=name
        )


def test_names_order_and_first_values_are_those_of_stock_batch_norm(operators):
    data = mx.sym.var("data")
    ours, stock = (
        runtime.batch_norm(data, "bn", 8),
        mx.sym.BatchNorm(data, name="bn", fix_gamma=False),
    )
    assert (
        ours.list_arguments() == stock.list_arguments()
        and ours.list_auxiliary_states() == stock.list_auxiliary_states()
    )
    assert len(ours.list_outputs()) == 1
    for name in stock.list_arguments() + stock.list_auxiliary_states():
        assert ours.attr_dict().get(name, {}).get("__init__") == stock.attr_dict().get(
            name, {}
        ).get("__init__"), name


class Stock:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        y = mx.sym.BatchNorm(x, name=name, fix_gamma=False, eps=1e-5, momentum=0.9)
        y = y if addend is None else y + addend
        return mx.sym.relu(y) if relu else y


class Ours:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        return runtime.batch_norm(x, name, channels, layout="NCHW", relu=relu, addend=addend)


class OursChannelLast:
    @staticmethod
    def norm(x, name, channels, relu=False, addend=None):
        last = lambda y: mx.sym.transpose(y, axes=(0, 2, 3, 1))  # noqa: E731
        y = runtime.batch_norm(
            last(x), name, channels, relu=relu, addend=None if addend is None else last(addend)
        )
        return mx.sym.transpose(y, axes=(0, 3, 1, 2))


def residual_network(ops):
    """A stem, a residual unit with a projection and one without: every way in which the operators are used."""
    conv = lambda x, name, filters, kernel: mx.sym.Convolution(  # noqa: E731
        x,
        name=name,
        num_filter=filters,
        kernel=(kernel, kernel),
        pad=(kernel // 2, kernel // 2),
        no_bias=True,
    )
    x = ops.norm(conv(mx.sym.var("data"), "conv0", 8, 3), "bn0", 8, relu=True)
    for unit in (1, 2):
        y = ops.norm(conv(x, f"u{unit}_conv1", 4, 3), f"u{unit}_bn1", 4, relu=True)
        y = conv(y, f"u{unit}_conv2", 12, 1)
        shortcut = ops.norm(conv(x, "u1_conv1sc", 12, 1), "u1_bnsc", 12) if unit == 1 else x
        x = ops.norm(y, f"u{unit}_bn2", 12, relu=True, addend=shortcut)
    x = mx.sym.FullyConnected(
        mx.sym.Pooling(x, global_pool=True, pool_type="avg", kernel=(1, 1)),
        num_hidden=5,
        name="fc1",
    )
    return mx.sym.SoftmaxOutput(x, name="softmax")


def train_step(ops, weights=None):
    """(output, gradients, statistics, first weights) of one step through Module, as the trainer does it."""
    random = np.random.RandomState(3)
    module = mx.mod.Module(residual_network(ops), context=mx.cpu())
    module.bind([("data", (6, 3, 9, 11))], [("softmax_label", (6,))])
    mx.random.seed(1)
    module.init_params(mx.init.Xavier())
    first = {name: array.asnumpy() for part in module.get_params() for name, array in part.items()}
    if weights:
        module.set_params(
            *({n: mx.nd.array(weights[n]) for n in part} for part in module.get_params())
        )
    images, labels = mx.nd.array(random.randn(6, 3, 9, 11)), mx.nd.array(random.randint(0, 5, 6))
    module.forward(mx.io.DataBatch([images], [labels]), is_train=True)
    module.backward()
    mx.nd.waitall()
    group = module._exec_group
    gradients = {
        name: arrays[0].asnumpy() for name, arrays in zip(group.param_names, group.grad_arrays)
    }
    statistics = {
        name: arrays[0].asnumpy() for name, arrays in zip(group.aux_names, group.aux_arrays)
    }
    return module.get_outputs()[0].asnumpy(), gradients, statistics, first


@pytest.mark.parametrize("ops", [Ours, OursChannelLast])
def test_a_residual_network_equals_the_one_of_stock_operators(operators, ops):
    output, gradients, statistics, first = train_step(Stock)
    ours = train_step(ops, first)
    assert residual_network(ops).list_arguments() == residual_network(Stock).list_arguments()
    assert (
        residual_network(ops).list_auxiliary_states()
        == residual_network(Stock).list_auxiliary_states()
    )
    assert set(ours[1]) == set(gradients) and len(gradients) == 20
    for name, value in ours[3].items():
        if not name.endswith("weight"):  # random
            np.testing.assert_array_equal(value, first[name], err_msg=name)
    np.testing.assert_allclose(ours[0], output, rtol=1e-4, atol=1e-6)
    count = 6 * 9 * 11
    for name, value in statistics.items():
        if name.endswith("var"):  # MXNet's own on a CPU keeps the biased one
            value = 0.9 + (value - 0.9) * count / (count - 1)
        np.testing.assert_allclose(ours[2][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in gradients.items():
        assert np.linalg.norm(ours[1][name] - value) <= 1e-4 * np.linalg.norm(value) + 1e-6, name


# The op set


CONFIG = Config(
    image_shape=(4, 32, 32),
    resize=32,
    batch_size=8,
    optimizer="sgdwfastlars",
    lr=0.1,
    lr_step_epochs="pow2",
    warmup_epochs=1,
    num_epochs=5,
    bn_gamma_init0=True,
)


def started(ops, config=CONFIG):
    trainer.seed_everything(1)
    made = trainer.Trainer(config, make_plan(config, 64, 1), World(), 10, mx.cpu(), ops(config))
    made.initialize()
    made.warm_up()
    return made


def batches():
    random = np.random.RandomState(2)
    return [
        Batch(
            mx.nd.array(random.randn(*CONFIG.batch_shape)), mx.nd.array(random.randint(0, 10, 8)), 8
        )
        for _ in range(3)
    ]


def after_two_steps(made):
    """Parameters and running statistics."""
    for batch in batches()[:2]:
        made.forward(batch)
        made.backward()
        made.update()
    mx.nd.waitall()
    return {
        name: array.asnumpy() for part in made._module.get_params() for name, array in part.items()
    }


def evaluated(made):
    score = made.evaluate(batches())
    return score, made._evaluator.get_outputs()[0].asnumpy()


@pytest.mark.parametrize("fused", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_the_op_set_trains_and_evaluates_resnet_50_as_the_plain_one(operators, monkeypatch, fused):
    # On a CPU, not on a GPU, MXNet folds the batch norms of a network that is bound for evaluation into the convolutions,
    # and does not see when the statistics change.
    monkeypatch.setenv("MXNET_SUBGRAPH_BACKEND", "NONE")
    config = dataclasses.replace(CONFIG, fuse_bn_relu=fused[0], fuse_bn_add_relu=fused[1])
    ours, plain = started(ExtensionOps, config), started(PlainOps)
    used = [node["op"] for node in json.loads(ours._module.symbol.tojson())["nodes"]]
    # 33 batch norms before a ReLU, 16 before an addition, and 4 in the shortcuts.
    assert [used.count(name) for name in runtime.OPERATORS] == [
        53 - 33 * fused[0] - 16 * fused[1],
        33 * fused[0],
        16 * fused[1],
    ]
    assert "BatchNorm" not in used
    found, expected = after_two_steps(ours), after_two_steps(plain)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if not name.endswith("moving_var"):  # biased in MXNet's own on a CPU
            assert np.linalg.norm(found[name] - value) <= 2e-3 * np.linalg.norm(value) + 1e-5, name
    score, output = evaluated(ours)
    for name, value in {
        n: a.asnumpy() for part in ours._module.get_params() for n, a in part.items()
    }.items():
        np.testing.assert_array_equal(value, found[name], err_msg=f"an evaluation changes {name}")
    plain._module.set_params(*ours._module.get_params())
    plain_score, plain_output = evaluated(plain)
    np.testing.assert_allclose(output, plain_output, rtol=1e-4, atol=1e-6)
    assert score == plain_score


def test_a_second_step_goes_on_from_the_running_statistics(operators):
    symbol = make("relu", 4, "NHWC")
    x = np.random.RandomState(0).randn(5, 3, 2, 4) + 2
    executor = symbol.simple_bind(mx.cpu(), data=x.shape)
    executor.aux_dict["bn_moving_var"][:] = 1
    for _ in range(2):
        executor.forward(is_train=True, data=mx.nd.array(x))
    mx.nd.waitall()
    np.testing.assert_allclose(
        executor.aux_dict["bn_moving_mean"].asnumpy(), 0.19 * x.mean((0, 1, 2)), rtol=1e-5
    )
    np.testing.assert_allclose(
        executor.aux_dict["bn_moving_var"].asnumpy(),
        0.81 + 0.19 * x.var((0, 1, 2), ddof=1),
        rtol=1e-5,
    )


def test_what_is_not_a_number_is_not_hidden(operators):
    arrays = {name: np.ones((2, 2, 2, 4)) for name in ("data", "head")}
    arrays.update(
        {name: np.ones(4) for name in ("bn_gamma", "bn_beta", "bn_moving_mean", "bn_moving_var")}
    )
    arrays["data"][0, 0, 0, 1] = np.nan
    output = runtime._step(make("relu", 4, "NHWC"), mx.cpu(), arrays, "float32")["output"]
    assert np.isnan(output[..., 1]).all() and not np.isnan(output[..., [0, 2, 3]]).any()


def imperative(data, count, **attributes):
    return mx.nd.mxresnet_batch_norm(data, *[mx.nd.ones(3)] * count, **attributes)


MISTAKES = [
    (
        lambda: make("plain", 8, "NHWC").infer_shape(data=(2, 3, 4, 9)),
        r"must have shape \(9\), one of them has \(8\)",
    ),
    (
        lambda: make("plain", 4, "NCHW").infer_shape(data=(2, 3, 4, 4)),
        r"must have shape \(3\), one of them has \(4\)",
    ),
    (
        lambda: make("plain", 4, "NHWC").infer_shape(data=(2, 3, 4)),
        r"data has shape \(2, 3, 4\), and 4 axes are needed",
    ),
    (lambda: make("plain", 4, "NHWC").infer_shape(), "the shape of data is not known"),
    (
        lambda: make("plain", 4, "NHWC").infer_shape(data=(1, 1, 1, 4)),
        "a channel has one value only",
    ),
    (
        lambda: make("add_relu", 4, "NHWC").infer_shape(data=(2, 3, 4, 4), addend=(2, 3, 4, 1)),
        r"addend has shape \(2, 3, 4, 1\), data \(2, 3, 4, 4\)",
    ),
    (
        lambda: make("plain", 4, "NHWC").infer_type(data="float16"),
        "data must be float32 in the cpu build",
    ),
    (
        lambda: make("plain", 4, "NHWC").infer_type(data="float32", bn_gamma="float16"),
        "gamma, beta, moving_mean and moving_var must be float32",
    ),
    (lambda: make("plain", 4, "NHWC", eps=0), "attribute eps=0: eps above 0"),
    (lambda: make("plain", 4, "NHWC", momentum="much"), "attribute momentum=much"),
    (lambda: make("plain", 4, "CHWN"), "attribute layout=CHWN"),
    (lambda: imperative(mx.nd.ones((2, 2, 2, 3)), 4, axis=1), "attribute axis=1"),
    (
        lambda: imperative(mx.nd.ones((2, 2, 2, 3)).tostype("row_sparse"), 4),
        "sparse arrays are not supported",
    ),
    (lambda: imperative(mx.nd.ones((2, 2, 2, 3)), 3), "number of inputs"),
]


@pytest.mark.parametrize("mistake, said", MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_told_and_does_not_crash(operators, mistake, said):
    with pytest.raises(mx.MXNetError) as error:
        mistake()
    short = runtime._short(error.value)
    assert (
        re.search(said, short)
        and "\n" not in short
        and "/" not in short.partition("mxresnet_")[0]
        or "number of inputs" in said
    ), short


# Whether the library can be used


def wait_for(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
    return condition()


def test_a_library_that_misbehaves_is_refused_and_the_process_goes_on(tmp_path):
    """Wrong numbers, a crash, a hang: all in one library, chosen by a variable."""
    spoilt = """
  const char *how = std::getenv("SPOILT") ? std::getenv("SPOILT") : "";
  if (!std::strcmp(how, "crash")) std::abort();
  while (!std::strcmp(how, "hang")) pause();
  const double dropped = std::strcmp(how, "wrong") ? 1 : 0;
"""

    def change(text):
        text = text.replace(
            "#include <cmath>",
            "#include <cmath>\n#include <cstdlib>\n#include <cstring>\n#include <unistd.h>",
        )
        start = text.index("int mxresnet_batch_norm_backward")
        body = text.index("{", start) + 1
        return (
            text[:body]
            + spoilt
            + text[body:].replace("normalized * product", "dropped * normalized * product")
        )

    path = package_in(tmp_path) / "csrc" / "batch_norm_cpu.cc"
    path.write_text(change(path.read_text()))
    inside(tmp_path, "-m", "mxresnet.model.cudnn_bn", "build", "--cpu")
    crash, hang, wrong, good = reasons_in(tmp_path, "crash", "hang", "wrong", "not at all")
    assert (
        crash == "its self-test was ended by signal 6"
        and hang == "its self-test did not end within 6 s"
        and good == ""
    )
    assert re.fullmatch(
        r"mxresnet_batch_norm computes data with an error of 0.\d+ \(at most 0.0001\)", wrong
    )
    # A rank that is killed while it waits leaves nothing behind.
    rank = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import mxnet as mx; from mxresnet.model.cudnn_bn import runtime; runtime.unavailable_reason(mx.cpu())",
        ],
        cwd=tmp_path,
        env={**os.environ, "SPOILT": "hang", "PYTHONPATH": str(tmp_path)},
    )
    test = wait_for(
        lambda: subprocess.run(
            ["pgrep", "-P", str(rank.pid), "-f", "extension test"], text=True, capture_output=True
        ).stdout.split()
    )[0]
    wait_for(lambda: "libmxresnet_cpu" in pathlib.Path(f"/proc/{test}/maps").read_text())
    rank.kill()
    rank.wait()
    wait_for(
        lambda: (
            not pathlib.Path(f"/proc/{test}").exists()
            or "Z" in pathlib.Path(f"/proc/{test}/stat").read_text()
        )
    )


def test_it_loads_after_horovod(operators):
    """Horovod makes MXNet's symbols visible to all that is loaded later; many are named as ours."""
    code = "import mxnet as mx, horovod.mxnet; from mxresnet.model.cudnn_bn import runtime; print(runtime._test(mx.cpu()) or 'good')"
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout == "good\n", done.stdout + done.stderr


def test_a_library_that_does_not_fit_is_refused(operators, tmp_path, monkeypatch):
    path = tmp_path / "libmxresnet_cpu.so"
    monkeypatch.setattr(extension_build, "library", lambda kind: path)
    built = (extension_build.BUILD / path.name).read_bytes()
    facts = extension_build.read_facts(extension_build.BUILD / path.name)
    assert facts == {
        "kind": "cpu",
        "mxnet": mx.__version__,
        "interface": "11",
        "sources": extension_build.source_hash(),
    }

    def reason(content):
        path.write_bytes(content)
        runtime.unavailable_reason.cache_clear()
        return runtime.unavailable_reason(mx.cpu())

    assert "is not built (python -m mxresnet.model.cudnn_bn build --cpu)" in runtime._unfit(
        mx.cpu()
    )
    assert "was not made by python -m mxresnet.model.cudnn_bn build" in reason(b"\177ELF")
    assert "was not made by" in reason(built.replace(b'"kind": "cpu"', b'"kind": "gpu"'))
    assert "was built for MXNet 1.8.0 and this is 1.9.1" in reason(
        built.replace(b'"mxnet": "1.9.1"', b'"mxnet": "1.8.0"')
    )
    assert "is older than its sources" in reason(
        built.replace(facts["sources"].encode(), b"0" * 16)
    )
    monkeypatch.setenv("MXNET_EXEC_INPLACE_GRAD_SUM_CAP", "2")
    assert reason(built).startswith("MXNET_EXEC_INPLACE_GRAD_SUM_CAP=2: below its default")
    monkeypatch.setenv("MXNET_EXEC_INPLACE_GRAD_SUM_CAP", "8")
    monkeypatch.setenv("MXNET_BACKWARD_DO_MIRROR", "1")
    assert reason(built).startswith("MXNET_BACKWARD_DO_MIRROR=1: forward would run twice")
    monkeypatch.setenv("MXNET_BACKWARD_DO_MIRROR", "0")
    assert reason(built) == ""
    runtime.unavailable_reason.cache_clear()


def test_a_library_that_cannot_be_loaded_is_refused(operators, tmp_path):
    """A file that only looks right: its first page is gone."""
    path = package_in(tmp_path) / "csrc" / "build" / "libmxresnet_cpu.so"
    path.parent.mkdir()
    path.write_bytes(b"\0" * 4096 + extension_build.library("cpu").read_bytes()[4096:])
    (said,) = reasons_in(tmp_path, "not at all")
    assert re.search(
        "libmxresnet_cpu.so does not load: .*(invalid ELF header|file too short)", said
    )


def test_the_networks_own_sizes_are_tried(operators, monkeypatch):
    assert runtime.large_test(mx.cpu(), 2) == ""
    real = runtime.batch_norm
    monkeypatch.setattr(
        runtime,
        "batch_norm",
        lambda data, name, channels, **how: (
            real(data, name, channels, **how) * (np.nan if channels == 2048 else 1)
        ),
    )
    assert runtime.large_test(mx.cpu(), 2) == "output is not finite for data of 2 x 7 x 7 x 2048"
    assert runtime.unavailable_reason(mx.cpu(), 1) is None
