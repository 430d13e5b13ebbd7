# SPDX-License-Identifier: Apache-2.0
"""Train 100 steps on a GPU or the CPU, and compare the losses and the evaluation.

    python benchmarks/gpu_training.py VARIANT [--device cpu] [--steps 100]

A variant is a precision, a layout and the operators: MXNet's ("public") or this project's batch
norms ("own"). The losses must be those of training_losses.json, which training_reference.py has
made with PyTorch in float64. The allowed difference is the larger of MIN_DIFFERENCE and FACTOR
times the difference that rounding to the same precision has made there.

Then the trained network evaluates images in the variant, and on the CPU in float32 with MXNet's
operators. Its probabilities may differ by as much as on the CPU after a change of each weight by
EVALUATION_ROUNDINGS roundings of the precision.

Exit status: 0 both agree, 1 one does not, 2 the variant cannot run here.
"""

import argparse
import contextlib
import os
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import training_problem as problem  # noqa: E402
from training_variants import VARIANTS  # noqa: E402

from mxresnet.errors import UserError  # noqa: E402

FACTOR = 8
MIN_DIFFERENCE = 1e-3
EVALUATION_ROUNDINGS = 4
MIN_PROBABILITY_DIFFERENCE = 1e-5
EVALUATION_BATCHES = 4
_UNIT_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_TO_CPU = (0, 3, 1, 2)  # axes of a convolution's weight, from (O, H, W, I) to (O, I, H, W)
_FROM_CPU = (0, 2, 3, 1)
_SAME = (0, 1, 2, 3)


def set_environment(environ):
    """Set variables that MXNet, cuDNN and cuBLAS read when they are loaded.

    On Ampere, NVIDIA's libraries round the inputs of float32 products to TF32 otherwise. On a CPU,
    MXNet otherwise folds the batch norms of an evaluation network into its convolutions, once.
    """
    environ["NVIDIA_TF32_OVERRIDE"] = "0"
    environ["MXNET_SUBGRAPH_BACKEND"] = "NONE"


def make_config(variant, **changes):
    """Return the settings of a run."""
    from mxresnet.config import Config

    layouts = ("input_layout", "conv_layout", "batchnorm_layout", "pooling_layout")
    return Config(
        **{
            **problem.SETTINGS,
            **dict.fromkeys(layouts, variant.layout),
            "dtype": variant.dtype,
            "fuse_bn_relu": int(variant.own_batch_norms),
            "fuse_bn_add_relu": int(variant.own_batch_norms),
            **changes,
        }
    )


def make_ops(variant, config, device):
    """Return the operator backend of a variant.

    Raises:
        UserError: This project's batch norms cannot be used.
    """
    from mxresnet.model import ops, select_ops

    on_gpu = device.device_type == "gpu"
    if not variant.own_batch_norms:
        return select_ops.select_ops(config, on_gpu, "the public operators were requested")
    if on_gpu:
        reason = select_ops.cudnn_bn_unavailable_reason(config, device)
    else:
        reason = ops.CudnnBnOps.unavailable_reason(device, batch_size=0)
    if reason:
        raise UserError(f"this project's batch norms cannot be used: {reason}")
    return ops.CudnnBnOps(config)


def _with_axes(array, axes):
    """Return a convolution's weight with other axes, and any other parameter as it is."""
    return array.transpose(axes) if array.ndim == 4 else array


def start_training(variant, device, world=None, **changes):
    """Return a warmed-up Trainer with the initial weights of the problem.

    Args:
        variant: One of VARIANTS.
        device: MXNet context.
        world: The ranks; None: only this process.
        changes: Settings that differ from the problem's.

    Raises:
        UserError: The variant cannot run on the device.
    """
    import mxnet as mx

    from mxresnet.parallel.world import World
    from mxresnet.run_plan import make_plan
    from mxresnet.trainer import Trainer

    config = make_config(variant, **changes)
    plan = make_plan(config, problem.STEPS_PER_EPOCH * problem.BATCH, num_ranks=1)
    ops = make_ops(variant, config, device)
    trainer = Trainer(config, plan, world or World(), problem.CLASSES, device, ops)
    trainer.initialize()
    parameters, statistics = trainer._module.get_params()
    channel_last = trainer.has_channel_last_weights
    shapes = {
        name: _with_axes(array.asnumpy(), _TO_CPU if channel_last else _SAME).shape
        for name, array in parameters.items()
    }
    for name, value in problem.initial_weights(shapes).items():
        value = _with_axes(value, _FROM_CPU if channel_last else _SAME)
        parameters[name][:] = mx.nd.array(value, dtype=parameters[name].dtype)
    trainer._module.set_params(parameters, statistics)
    trainer.warm_up()
    return trainer


def make_batches(config, device):
    """Return the batches of one epoch."""
    import mxnet as mx

    from mxresnet.data.loader import Batch

    images, labels = problem.images_and_labels()
    if config.input_layout == "NHWC":
        images = images.transpose(0, 1, 3, 4, 2)
    return [
        Batch(
            mx.nd.array(image, ctx=device, dtype=config.input_dtype),
            mx.nd.array(label, ctx=device),
            problem.BATCH,
        )
        for image, label in zip(images, labels)
    ]


def train(trainer, batches, steps):
    """Take steps and return the loss of each."""
    losses = []
    for step in range(steps):
        number = step % problem.STEPS_PER_EPOCH
        trainer.forward(batches[number])
        losses.append(trainer.take_loss())
        trainer.backward()
        trainer.update()
    trainer.wait()
    return losses


def compare_losses(losses, dtype):
    """Print the comparison of losses with the expected ones; return whether they agree."""
    expected = problem.read_expected()
    difference = np.abs(np.array(losses) - expected["losses"][: len(losses)])
    deviations = np.array(expected["deviations"][dtype][: len(losses)])
    allowed = np.maximum(FACTOR * deviations, MIN_DIFFERENCE)
    ratios = np.nan_to_num(difference / allowed, nan=np.inf)
    worst = int(ratios.argmax())
    print(
        f"losses of {len(losses)} steps: {losses[0]:.4f} to {losses[-1]:.4f}; step {worst + 1} is "
        f"nearest to its limit: {difference[worst]:.2g} from float64 (limit {allowed[worst]:.2g})"
    )
    return bool(ratios[worst] <= 1)


def evaluate_on_cpu(parameters, statistics, images):
    """Return the probabilities of images (N, 4, H, W) in float32, with MXNet's operators, NCHW.

    Args:
        parameters: numpy arrays by name, convolutions as (O, I, H, W).
        statistics: The running statistics, likewise.
        images: numpy array.
    """
    import mxnet as mx

    from mxresnet.model import resnet
    from mxresnet.model.ops import PlainOps

    config = make_config(VARIANTS["float32-nchw-public"], batch_size=len(images))
    symbol = resnet.build(PlainOps(config), config, problem.CLASSES)
    executor = symbol.simple_bind(mx.cpu(), grad_req="null", data=images.shape)
    executor.copy_params_from(
        *({name: mx.nd.array(a) for name, a in part.items()} for part in (parameters, statistics))
    )
    return executor.forward(is_train=False, data=mx.nd.array(images))[0].asnumpy()


def compare_evaluation(trainer, batches, dtype):
    """Print the comparison of evaluations with the CPU's; return whether they agree."""
    import mxnet as mx

    batches = batches[:EVALUATION_BATCHES]
    score = trainer.evaluate(batches)
    found = []
    for batch in batches:
        trainer._evaluator.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=False)
        found.append(trainer._evaluator.get_outputs()[0].asnumpy())
    found = np.concatenate(found)
    axes = _TO_CPU if trainer.has_channel_last_weights else _SAME
    parameters, statistics = (
        {name: _with_axes(array.asnumpy(), axes).astype(np.float32) for name, array in part.items()}
        for part in trainer._module.get_params()
    )
    images, labels = problem.images_and_labels()
    images, labels = (np.concatenate(part[:EVALUATION_BATCHES]) for part in (images, labels))
    expected = evaluate_on_cpu(parameters, statistics, images)
    random = np.random.RandomState(2)
    size = EVALUATION_ROUNDINGS * _UNIT_ROUNDING[dtype]
    changed = {
        name: value * (1 + size * random.uniform(-1, 1, value.shape)).astype(np.float32)
        for name, value in parameters.items()
    }
    by_rounding = np.abs(evaluate_on_cpu(changed, statistics, images) - expected).max()
    allowed = max(by_rounding, MIN_PROBABILITY_DIFFERENCE)
    difference = np.nan_to_num(np.abs(found - expected), nan=np.inf).max()
    count = int((found.argmax(1) == labels).sum())
    print(
        f"evaluation: {score.correct} of {score.total} images right, {count} by the outputs; "
        f"{(expected.argmax(1) == labels).sum()} on the CPU; probabilities differ by "
        f"{difference:.2g} at most (limit {allowed:.2g})"
    )
    return bool(difference <= allowed) and (score.correct, score.total) == (count, len(labels))


@contextlib.contextmanager
def narrow_network():
    """Make mxresnet.model.resnet build the network of the problem."""
    from mxresnet.model import resnet

    filters = resnet.STEM_FILTERS, resnet.STAGE_FILTERS
    resnet.STEM_FILTERS, resnet.STAGE_FILTERS = problem.STEM_FILTERS, problem.STAGE_FILTERS
    try:
        yield
    finally:
        resnet.STEM_FILTERS, resnet.STAGE_FILTERS = filters


def check(name, device, steps, **changes):
    """Train and evaluate a variant; return whether its losses and its evaluation are right.

    Args:
        name: Key of VARIANTS.
        device: MXNet context.
        steps: Number of steps, at most those of the problem.
        changes: Settings that differ from the problem's, to prove that this is noticed.

    Raises:
        UserError: The variant cannot run on the device.
    """
    variant = VARIANTS[name]
    with narrow_network():
        trainer = start_training(variant, device, **changes)
        batches = make_batches(trainer._config, device)
        losses = train(trainer, batches, steps)
        right = compare_losses(losses, variant.dtype)
        return compare_evaluation(trainer, batches, variant.dtype) and right


def main():
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--steps", type=int, default=problem.STEPS)
    options = parser.parse_args()
    set_environment(os.environ)
    import mxnet as mx

    try:
        if options.device not in VARIANTS[options.variant].devices:
            raise UserError(f"{options.variant} is not for the {options.device}")
        if options.device == "gpu" and not mx.context.num_gpus():
            raise UserError("MXNet finds no GPU")
        device = mx.gpu(0) if options.device == "gpu" else mx.cpu()
        right = check(options.variant, device, options.steps)
    except UserError as error:
        print(f"gpu_training.py: {error}", file=sys.stderr, flush=True)
        right = None
    status = {True: 0, False: 1, None: 2}[right]
    sys.stdout.flush()
    os._exit(status)  # MXNet 1.9.1 may crash when it releases a GPU at the end of a process


if __name__ == "__main__":
    main()
