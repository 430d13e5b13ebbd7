# Image for NVIDIA GPUs from Volta to Ada (V100, T4, A100, A30, A10), with public packages only.
#   docker build -t mxresnet:gpu .
# The steps are those on a bare machine: setup_env.sh, with the CUDA 11.8 compiler of Debian. The CUDA
# libraries come from the Python package index. It needs driver 450 or newer; with one older than
# 520, operators are not fused at run time. Built without a GPU; not run on one yet.
# Another distribution, of the same version for both images: docs/setup.md ("Images"). To pin the
# images, give them with digests: --build-arg BUILD_IMAGE=debian@sha256:... (also RUNTIME_IMAGE)
ARG BUILD_IMAGE=debian:12-slim
ARG RUNTIME_IMAGE=debian:12-slim
FROM ${BUILD_IMAGE} AS build
# Empty for an image that has nvcc.
ARG TOOLKIT=nvidia-cuda-toolkit
RUN sources=/etc/apt/sources.list.d/debian.sources && \
    if [ -f $sources ]; then sed -i 's/^Components: main$/& contrib non-free/' $sources; fi && \
    apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3 python3-venv ${TOOLKIT}
WORKDIR /workspace/mxresnet
COPY setup.py setup_env.sh README.md ./
COPY requirements requirements
COPY mxresnet mxresnet
COPY prepare prepare
# No GPU is needed, nor seen here.
RUN SETUP_DEVICE=gpu ./setup_env.sh

FROM ${RUNTIME_IMAGE}
# openssh-server: for workers of mpi-operator. procps, tar: for kubectl cp and for inspection.
# libgomp1, libquadmath0: for MXNet.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        libgomp1 libquadmath0 numactl openssh-client openssh-server procps python3 tar && \
    rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* && \
    dpkg-divert --local --rename --divert /usr/lib/openssh/sshd /usr/sbin/sshd && \
    useradd --create-home --uid 1000 --password '*' mxresnet
WORKDIR /workspace/mxresnet
# The same path as in the build: Horovod's library contains it.
COPY --from=build /workspace/mxresnet /workspace/mxresnet
COPY . .
COPY k8s/image/ssh_config /etc/ssh/ssh_config.d/mpi.conf
COPY k8s/image/sshd_config /etc/ssh/sshd_config.d/mpi.conf
# Makes the host key when a container starts.
COPY k8s/image/sshd /usr/sbin/sshd
ENV PATH=/workspace/mxresnet/.venv/bin:$PATH
# The folders that runs write to, as any user.
RUN python -m compileall -q mxresnet prepare && \
    install -d -m 1777 data results /data /results
# For NVIDIA's container runtime: the GPUs, the driver's libraries (the JPEG decoder of a GPU needs
# video), and the oldest driver, which it checks when a container starts: 450.
ENV NVIDIA_VISIBLE_DEVICES=all
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,video
ENV NVIDIA_REQUIRE_CUDA=cuda>=11.0
LABEL org.opencontainers.image.title="mxresnet" \
      org.opencontainers.image.description="ResNet-50 to the MLPerf target with MXNet, Horovod and DALI, for NVIDIA GPUs from Volta to Ada" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 1000:1000
CMD ["./run_and_time.sh"]
