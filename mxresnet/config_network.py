# SPDX-License-Identifier: Apache-2.0
"""The settings of the network and of the optimizer: the first part of Config (config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from mxresnet.config_field import (
    EPOCHS,
    FUSED,
    NOT_NEGATIVE,
    NVIDIA_MXNET,
    POSITIVE,
    at_least,
    between,
    one_of,
    parse_gpu_list,
    parse_image_shape,
    parse_lr_step_epochs,
    setting,
)

# The reference's networks compute the same function with different operators. Its network "basic"
# is not listed: it has no residual units.
NETWORKS = tuple(
    "resnet-v1b" + variant
    for variant in (
        "",
        "-fl",
        "-mod-fl",
        "-normconv-fl",
        "-stats-fl",
        "-dbar-fl",
        "-dbar2-fl",
        "-mainloop-fl",
    )
)


@dataclass(frozen=True)
class NetworkSettings:
    """How the network is built and trained. Each field declares one flag."""

    # Network
    network: str = setting(
        "resnet-v1b-fl",
        "NETWORK",
        "the reference's network; all are ResNet v1.5",
        one_of(*NETWORKS),
    )
    num_layers: int = setting(
        50, "NUM_LAYERS", "layers of the network", one_of(18, 34, 50, 101, 152, 200, 269)
    )
    num_classes: int = setting(
        0, "NUM_CLASSES", "classes; 0: as in the manifest, else 1000 (own)", between(0, 2**24)
    )
    image_shape: Tuple[int, int, int] = setting(
        (3, 224, 224),
        "IMAGE_SHAPE",
        "channels,height,width of the network's input; channel 4 is zero padding",
        parse=parse_image_shape,
    )
    dtype: str = setting(
        "float32",
        "DTYPE",
        "precision of convolutions and activations; bfloat16: CPUs only, float16: GPUs only",
        one_of("float32", "float16", "bfloat16"),
    )
    input_layout: str = setting(
        "NCHW", "INPUT_LAYOUT", "layout of the input batches", one_of("NCHW", "NHWC")
    )
    conv_layout: str = setting(
        "NCHW", "CONV_LAYOUT", "layout of convolutions", one_of("NCHW", "NHWC")
    )
    batchnorm_layout: str = setting(
        "NCHW", "BATCHNORM_LAYOUT", "layout of batch norms", one_of("NCHW", "NHWC")
    )
    pooling_layout: str = setting(
        "NCHW", "POOLING_LAYOUT", "layout of poolings", one_of("NCHW", "NHWC")
    )
    batchnorm_eps: float = setting(1e-5, "BATCHNORM_EPS", "batch-norm epsilon", POSITIVE)
    batchnorm_mom: float = setting(
        0.9, "BATCHNORM_MOM", "momentum of the batch-norm running statistics", between(0, 1)
    )
    bn_group: int = setting(
        1,
        "BN_GROUP",
        "number of ranks of a machine that share batch-norm statistics",
        one_of(1, 2, 4, 8),
    )
    bn_gamma_init0: bool = setting(
        False,
        "BN_GAMMA_INIT0",
        "initialize each unit's last gamma to 0, and fc1 like a convolution",
    )
    fuse_bn_relu: int = setting(
        0, "FUSE_BN_RELU", "fuse ReLU into the batch norm where the operator can", at_least(0)
    )
    fuse_bn_add_relu: int = setting(
        0,
        "FUSE_BN_ADD_RELU",
        "fuse the shortcut addition and ReLU into the batch norm where the operator can",
        at_least(0),
        requires=FUSED,
    )
    conv_algo: int = setting(
        -1,
        "CONV_ALGO",
        "cuDNN algorithm of all convolutions; -1: cuDNN chooses",
        at_least(-1),
        requires=NVIDIA_MXNET,
    )
    force_tensor_core: int = setting(
        0, "FORCE_TENSOR_CORE", "1: only tensor-core algorithms", at_least(0), requires=NVIDIA_MXNET
    )
    verbose: int = setting(
        0, "VERBOSE", "1: report the algorithms cuDNN chooses", at_least(0), requires=NVIDIA_MXNET
    )
    e2e_cuda_graphs: int = setting(
        0, "E2E_CUDA_GRAPHS", "1: run a step as one CUDA graph", at_least(0), requires=NVIDIA_MXNET
    )
    gpus: str = setting(
        "",
        "GPUS",
        "GPU numbers by local rank, as in 0,1; empty: all GPUs, or the CPU where there is none",
        parse=parse_gpu_list,
    )

    # Optimizer
    optimizer: str = setting(
        "sgd", "OPTIMIZER", "optimizer", one_of("sgd", "sgdwlars", "sgdwfastlars", "sgdwfastlarsv2")
    )
    batch_size: int = setting(1664, "BATCHSIZE", "images per rank and step", between(1, 2**20))
    lr: float = setting(0.6, "LR", "peak learning rate", POSITIVE)
    lr_step_epochs: str = setting(
        "30,60,80",
        "LRSCHED",
        '"pow2": polynomial decay of power 2 to 1e-4; else the epochs at which the rate drops',
        parse=parse_lr_step_epochs,
    )
    lr_factor: float = setting(
        0.1, "LR_FACTOR", "factor of each drop; 1 or more: the rate never changes", POSITIVE
    )
    num_epochs: int = setting(
        90, "NUMEPOCHS", "maximum epochs, and length of the learning-rate schedule", EPOCHS
    )
    warmup_epochs: int = setting(5, "WARMUP_EPOCHS", "epochs of learning-rate warm-up", at_least(0))
    warmup_strategy: str = setting(
        "linear",
        "WARMUP_STRATEGY",
        "form of the warm-up when the rate drops at epochs",
        one_of("linear", "constant"),
    )
    mom: float = setting(0.9, "MOM", "momentum", between(0, 1))
    wd: float = setting(1e-4, "WD", "weight decay", NOT_NEGATIVE)
    lars_eta: float = setting(0.001, "LARSETA", "LARS trust coefficient", POSITIVE)
    lars_eps: float = setting(0.0, "LARS_EPS", "LARS epsilon", NOT_NEGATIVE)
    label_smoothing: float = setting(
        0.0, "LABELSMOOTHING", "label smoothing, as a fraction", between(0, 1)
    )
    kv_store: str = setting("horovod", "KVSTORE", "gradient exchange", one_of("horovod"))
    num_groups: int = setting(
        1,
        "MXNET_HOROVOD_NUM_GROUPS",
        "fused groups of gradients to all-reduce; 0: all-reduce each gradient alone",
        at_least(0),
    )
