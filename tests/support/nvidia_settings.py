# SPDX-License-Identifier: Apache-2.0
"""Settings of the published configurations, for networks with NVIDIA's fused operators."""

NHWC_LAYOUTS = {f"{kind}_layout": "NHWC" for kind in ("input", "conv", "batchnorm", "pooling")}
FUSED = {"fuse_bn_relu": 1, "fuse_bn_add_relu": 1}
NVIDIA_SETTINGS = {"dtype": "float16", **NHWC_LAYOUTS, **FUSED}
