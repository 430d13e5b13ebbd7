# shellcheck shell=bash
# For setup_env.sh, which sources this file: the environment for NVIDIA GPUs. Find the GPUs and a
# CUDA 11 toolkit, and let MXNet, Horovod and cudnn_bn find the CUDA libraries. $venv, $device,
# $python and the functions that are not defined here are those of setup_env.sh.

: "${venv:?}" "${device=}"
# What libmxnet.so of mxnet-cu112 loads, and the headers that Horovod and cudnn_bn include.
cuda_libraries="libcublas.so.11 libcublasLt.so.11 libcudart.so.11.0 libcudnn.so.8 libcufft.so.10"
cuda_libraries+=" libcurand.so.10 libcusolver.so.11 libnccl.so.2 libnvrtc.so.11.2"
cuda_libraries+=" libnvToolsExt.so.1"
cuda_headers="cublas_v2.h cudnn_version.h curand.h nccl.h"
# Compute capabilities that mxnet-cu112 has code for: Maxwell to Ampere.
cuda_architectures=50,60,70,75,80,86

# End with status 2 if SETUP_DEVICE has another value than the two that exist.
check_device_variable() {
    case ${SETUP_DEVICE-} in
        "" | cpu | gpu) ;;
        *)
            log "setup_env.sh: SETUP_DEVICE=$SETUP_DEVICE: use cpu or gpu, or unset it: the" \
                "environment is then for the GPUs of this machine, if it has any"
            exit 2
            ;;
    esac
}

# Print what nvidia-smi answers about each GPU that this process may use. Fails if there is no
# answer, with the reason as output.
query_gpus() {
    local answer query=("--query-gpu=$1" "--format=csv,noheader")
    case ${CUDA_VISIBLE_DEVICES-all} in
        all) ;;
        "" | -1 | NoDevFiles) return ;;
        *) # nvidia-smi does not know every name, such as those of parts of GPUs (MIG)
            if answer=$(nvidia-smi -i "$CUDA_VISIBLE_DEVICES" "${query[@]}" 2>/dev/null); then
                echo "$answer"
                return
            fi
            ;;
    esac
    nvidia-smi "${query[@]}" 2>&1
}

# Print "name, driver version" of each GPU that this process may use, or nothing.
list_gpus() {
    local answer
    command -v nvidia-smi >/dev/null || return 0
    if answer=$(query_gpus name,driver_version); then
        echo "$answer"
    elif [[ $answer != *"No devices were found"* ]]; then
        die "nvidia-smi fails (${answer//$'\n'/ }), so the GPUs of this machine are not known:" \
            "repair the NVIDIA driver, or set SETUP_DEVICE=cpu to train on the CPU"
    fi
}

# Set device to the one that the environment is for. An environment for GPUs is used wherever it
# exists: the launcher of a job may see no GPU.
choose_device() {
    device=${SETUP_DEVICE-}
    [ -z "$device" ] || return 0
    device=gpu
    ! is_current .ready || return 0
    case ${DGXSYSTEM-} in CPU*) device=cpu && return ;; esac
    gpus=$(list_gpus) || exit
    [ -n "$gpus" ] || device=cpu
}

# Print the GPUs for a message, such as "8 x NVIDIA A100-SXM4-80GB".
gpus_text() {
    [ -n "$gpus" ] || { echo "SETUP_DEVICE=gpu is set" && return; }
    cut -d, -f1 <<<"$gpus" | sort | uniq -c | sed -E 's/^ *([0-9]+) /\1 x /' | paste -sd ';'
}

# Check that the driver and the GPUs can run mxnet-cu112.
check_gpus() {
    local driver capabilities capability
    gpus=$(list_gpus) || exit
    [ -n "$gpus" ] || return 0 # as while an image is built
    driver=${gpus##*, }
    case ${driver%%.*} in
        *[!0-9]* | "") ;;
        [0-9] | [0-9][0-9] | [1-3][0-9][0-9] | 4[0-4][0-9])
            die "the NVIDIA driver of this machine is $driver, and CUDA 11 needs 450 or newer:" \
                "install 520 or newer, or set SETUP_DEVICE=cpu to train on the CPU"
            ;;
        4[5-9][0-9] | 50[0-9] | 51[0-9])
            log "note: with the NVIDIA driver $driver, operators are not fused at run time, which" \
                "needs 520 or newer"
            ;;
    esac
    capabilities=$(query_gpus compute_cap) || return 0 # a driver that does not know the question
    for capability in $capabilities; do
        case $capability in
            [5-8].*) ;;
            [0-9].* | [0-9][0-9].*)
                die "$(gpus_text): compute capability $capability, and the last public MXNet for" \
                    "GPUs (mxnet-cu112 1.9.1) has code for 5.0 to 8.x only, Maxwell to Ada: use" \
                    "such a GPU, or set SETUP_DEVICE=cpu to train on the CPU"
                ;;
        esac
    done
}

# Print the version of an nvcc, such as 11.8, or nothing.
nvcc_version() { "$1" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\),.*/\1/p'; }

# Export CUDACXX, the nvcc of a CUDA 11 toolkit. 11.0 has no compute capability 8.6.
find_nvcc() {
    local candidate version found=""
    for candidate in ${CUDACXX:+"$CUDACXX"} ${CUDA_HOME:+"$CUDA_HOME/bin/nvcc"} nvcc \
        /usr/local/cuda/bin/nvcc /usr/local/cuda-11*/bin/nvcc; do
        candidate=$(command -v "$candidate") || continue
        version=$(nvcc_version "$candidate")
        case $version in
            11.[1-9])
                export CUDACXX=$candidate
                return
                ;;
            ?*) found+="${found:+, }CUDA $version in $candidate" ;;
        esac
    done
    die "$(gpus_text), but no CUDA 11 toolkit to compile Horovod with (nvcc 11.1 to 11.8; found:" \
        "${found:-none}): install one (apt-get install nvidia-cuda-toolkit on Debian 12 with" \
        "non-free, Ubuntu 22.04) and name it in CUDA_HOME; or use the image: docker build -t" \
        "mxresnet:gpu . && CONT=mxresnet:gpu ./run_with_docker.sh; or set SETUP_DEVICE=cpu to" \
        "train on the CPU"
}

# Export CXX, a C++ compiler that nvcc accepts: it refuses those that are newer than itself.
find_cuda_cxx() {
    local candidate test output="" first=${CXX:-c++} found=""
    test=$(mktemp -d)
    printf '%s\n' '#include <cuda_fp16.h>' '#include <cuda_runtime.h>' '#include <stdexcept>' \
        '__global__ void set(float *x) { *x = 1; }' \
        'cudaError_t launch(float *x) { set<<<1, 1>>>(x); return cudaGetLastError(); }' \
        >"$test/test.cu"
    for candidate in "$first" g++-11 g++-10 g++-9; do
        command -v "$candidate" >/dev/null || continue
        if output+=$("$CUDACXX" -ccbin "$candidate" -arch=sm_80 -shared -Xcompiler -fPIC \
            -o "$test/test.so" "$test/test.cu" 2>&1); then
            found=$candidate
            break
        fi
    done
    rm -rf "$test"
    export CXX=$found
    [ -n "$found" ] ||
        die "$CUDACXX cannot compile with $first ($(grep -m 1 -i error <<<"$output")): it needs" \
            "g++ 11 or older (apt-get install g++-11, for CUDA 11.4 and older g++-10) and" \
            "CUDA's runtime (cuda-cudart-dev)"
}

# Print the folder of the environment's packages.
packages_folder() {
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# Succeed if the machine has all CUDA libraries where the loader finds them, with their headers. A
# part of them would be a combination that nobody has tested.
has_cuda_libraries() {
    local name cache
    cache=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2>/dev/null)
    for name in $cuda_libraries; do
        [[ $cache == *"$name "* ]] || return
    done
    # shellcheck disable=SC2086  # several words
    printf '#include <%s>\n' $cuda_headers |
        c++ -fsyntax-only -I "${CUDACXX%/bin/nvcc}/include" -x c++ - 2>/dev/null
}

# Install the CUDA libraries from the package index, and let MXNet find them.
#
# libmxnet.so has the RPATH $ORIGIN: the loader searches its own folder before LD_LIBRARY_PATH and
# all others. Links there need no variable that each launcher, rank and tool would have to set, and
# no change of a file whose hash was checked. mxresnet/cuda_libraries.py is about what these
# libraries load in turn.
install_cuda_libraries() {
    local packages file
    ! has_cuda_libraries || return 0
    pip_install_locked cuda.txt --no-compile || return
    packages=$(packages_folder)
    for file in "$packages"/nvidia/*/lib/lib*.so.*; do
        ln -sf "../${file#"$packages/"}" "$packages/mxnet/${file##*/}" || return
    done
    ln -sf libnccl.so.2 "$packages/nvidia/nccl/lib/libnccl.so" # the linker's name
}

# Write a library that stands in for the NVIDIA driver's, with the functions that MXNet links to.
# Each of them answers that there is no GPU (CUDA_ERROR_NO_DEVICE).
write_driver_stub() {
    nm -D --undefined-only "$(packages_folder)/mxnet/libmxnet.so" |
        sed -n 's/^ *U \(cu[A-Z]\w*\).*/extern "C" int \1() { return 100; }/p' |
        c++ -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$1/libcuda.so.1" -x c++ -
}

# Run a command that imports MXNet, also where there is no driver, as while an image is built.
with_driver() {
    local stub=$venv/driver-stub
    if [ "$device" = gpu ] &&
        ! "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; then
        mkdir -p "$stub" && write_driver_stub "$stub" || return
        set -- env LD_LIBRARY_PATH="$stub${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$@"
    fi
    "$@"
}

# Export what Horovod's build needs for GPUs. Gradients are exchanged over NCCL, everything else
# over MPI.
export_horovod_gpu_build() {
    local packages
    export HOROVOD_BUILD_CUDA_CC_LIST=$cuda_architectures
    PATH=$(dirname "$CUDACXX"):$PATH # it asks this nvcc which of them it knows
    # The library that MXNet loads too, not a copy of its own.
    export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
    packages=$(packages_folder)
    [ -d "$packages/nvidia/nccl" ] || return 0
    export HOROVOD_NCCL_HOME=$packages/nvidia/nccl
    # MXNet's headers include these.
    export CPLUS_INCLUDE_PATH=$packages/nvidia/cublas/include:$packages/nvidia/curand/include
}

# Build this project's batch norms, with the CUDA libraries that MXNet loads.
build_batch_norms() {
    "$venv/bin/python" -m mxresnet.model.cudnn_bn build --gpu --cuda "$(packages_folder)" \
        --cuda "$(dirname "$(dirname "$CUDACXX")")"
}

install_gpu_packages() {
    "${python:?}" -m venv "$venv" && pip_install_locked gpu.txt --no-compile &&
        restore_numpy_bool && install_cuda_libraries && pip_install_project
}
