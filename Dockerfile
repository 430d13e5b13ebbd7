# Image for NVIDIA GPUs from Volta to Ampere (V100, T4, A100, A30, A10), with public packages only.
#   docker build -t mxresnet:gpu .
# CUDA 11.8: its libraries have the names that MXNet's CUDA 11.2 wheel loads. It needs driver 450 or
# newer; with one older than 520, operators are not fused at run time. NOT BUILT yet, because no container engine and no GPU was available. Tests without them:
# tests/cluster/test_images.py and tests/cluster/test_dockerfiles.py.
# To pin the base images, give them with digests: --build-arg BUILD_IMAGE=nvidia/cuda@sha256:...
ARG BUILD_IMAGE=nvidia/cuda:11.8.0-cudnn8-devel-ubuntu22.04
ARG RUNTIME_IMAGE=nvidia/cuda:11.8.0-cudnn8-runtime-ubuntu22.04
FROM ${BUILD_IMAGE} AS build
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ libgomp1 libquadmath0 python3 python3-venv
WORKDIR /workspace/mxresnet
COPY setup.py README.md ./
COPY requirements requirements
COPY mxresnet mxresnet
COPY prepare prepare
ENV PATH=/workspace/mxresnet/.venv/bin:$PATH
RUN python3 -m venv .venv && \
    pip install --require-hashes --only-binary :all: --no-deps -r requirements/gpu.txt
# Horovod's build imports MXNet, which loads the CUDA driver: CUDA's stub of the driver is enough.
# The build passes VERBOSE=1 to cmake, and ninja would build that as a target. Gradients are
# exchanged over NCCL, everything else over MPI.
RUN ln -s /usr/local/cuda/lib64/stubs/libcuda.so /usr/local/cuda/lib64/stubs/libcuda.so.1 && \
    printf '%s\n' '#!/bin/sh' 'for a do shift; [ "$a" = VERBOSE=1 ] || set -- "$@" "$a"; done' \
        'exec cmake "$@"' >/usr/local/bin/horovod-cmake && \
    chmod +x /usr/local/bin/horovod-cmake && \
    LD_LIBRARY_PATH=/usr/local/cuda/lib64/stubs:/usr/local/cuda/lib64 HOROVOD_CMAKE=horovod-cmake CMAKE_GENERATOR=Ninja \
    HOROVOD_WITH_MXNET=1 HOROVOD_WITH_MPI=1 \
    HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
    HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_BUILD_CUDA_CC_LIST=70,75,80,86 \
    pip install --no-cache-dir --require-hashes --no-binary horovod --no-deps --no-build-isolation \
        -r requirements/horovod.txt
RUN pip install --no-index --no-deps --no-build-isolation -e . && pip check
# This project's batch norms, for this MXNet and the cuDNN of this image.
RUN python -m mxresnet.model.cudnn_bn build --gpu

FROM ${RUNTIME_IMAGE}
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libgomp1 libquadmath0 numactl openssh-client openssh-server procps python3 tar && \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && mkdir -p /run/sshd && \
    dpkg-divert --local --rename --divert /usr/lib/openssh/sshd /usr/sbin/sshd
WORKDIR /workspace/mxresnet
# The same path as in the build: Horovod's library contains it.
COPY --from=build /workspace/mxresnet /workspace/mxresnet
COPY . .
# Mark .venv as complete, so that setup_env.sh uses it. The script cannot test this by importing
# MXNet, because that needs a GPU.
RUN ./setup_env.sh --fingerprint >.venv/.ready
COPY k8s/image/ssh_config /etc/ssh/ssh_config.d/mpi.conf
COPY k8s/image/sshd_config /etc/ssh/sshd_config.d/mpi.conf
# Makes the host key when a container starts.
COPY k8s/image/sshd /usr/sbin/sshd
ENV PATH=/workspace/mxresnet/.venv/bin:$PATH
# Leave out the image's forward-compatibility driver. It is for data-centre GPUs with old drivers;
# on other machines it would replace the machine's own driver.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/usr/local/cuda/lib64
# The base image has compute and utility only; the JPEG decoder of a GPU needs video.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
LABEL org.opencontainers.image.title="mxresnet" \
      org.opencontainers.image.description="ResNet-50 to the MLPerf target with MXNet, Horovod and DALI, for NVIDIA GPUs from Volta to Ampere" \
      org.opencontainers.image.licenses="Apache-2.0"
CMD ["./run_and_time.sh"]
