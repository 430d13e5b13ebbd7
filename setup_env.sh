#!/usr/bin/env bash
# Create the Python environment .venv if needed and print the path of its python.
#
#   ./setup_env.sh                 for training and data preparation
#   ./setup_env.sh --dev           also for the tests and the linters
#   ./setup_env.sh --launcher-python
#                                  print the path of a Python 3.8 or newer; create nothing, if
#                                  the machine has one
#
# SETUP_DEVICE=cpu or gpu chooses what the environment is for. Not set: for the GPUs of this
# machine, or for its CPU if nvidia-smi lists none.
# If the active python already has mxnet and horovod (as in a container), this script prints its
# path and installs nothing. Otherwise it installs packages from the Python package index and
# compiles Horovod, for which the machine needs a C++ compiler and, for GPUs, a CUDA 11 toolkit.
# Python 3.9, 3.10, 3.11 or 3.12 is used if the machine has it. Otherwise uv downloads Python 3.11
# into .venv/python.
# Progress goes to standard error, the output of each command to a file .venv/*.log.
# The script can be interrupted at any time: the next call continues.
set -euo pipefail

# The caller may have exported functions with the names of commands.
for name in $(compgen -A function); do unset -f "$name"; done
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
here=$(CDPATH='' builtin cd -- "$(dirname -- "$script")" && pwd)
venv=$here/.venv
steps=3
step=0
python=""     # the Python that .venv is created with; empty if it has yet to be downloaded
guard=""      # the Python that runs process_guard.py; empty if the machine has none
dev=false     # whether to install the packages for the tests and the linters
device=""     # what the environment is for: cpu or gpu
gpus=""       # "name, driver version" of each GPU
size="1.7 GB" # of the environment

log() { printf '%s\n' "$*" >&2; }

die() {
    log "setup_env.sh: $*"
    exit 1
}

source "$here/mxresnet/launch/setup_machine.sh"
source "$here/mxresnet/launch/setup_gpu.sh"
check_system
declare -A running=() # process id of a guard -> name of the function that runs under it

# Print the device and a hash of the files that define the environment. When the hash changes, .venv
# is updated; for another device it is made anew.
fingerprint() {
    local files=("$here"/requirements/*.txt "$here/setup.py" "$here/setup_env.sh")
    files+=("$here/mxresnet/launch/setup_gpu.sh")
    echo "$device $(cat "${files[@]}" | sha256sum | cut -d' ' -f1)"
}

# Succeed if a marker file (.ready or .ready-dev) exists and has the current fingerprint.
is_current() { [ "$(cat "$venv/$1" 2>/dev/null)" = "$(fingerprint)" ]; }

# Print the path of a Python 3.8 or newer, or nothing. It is enough for the launchers and the guard,
# which run before the environment exists.
any_python() {
    local candidate test='import sys; sys.exit(sys.version_info < (3, 8))'
    for candidate in python python3 python3.11 python3.10 python3.9 python3.8 python3.12 \
        "$venv/bin/python"; do
        PYTHONPATH='' "$candidate" -c "$test" 2>/dev/null || continue
        command -v "$candidate"
        return
    done
}

# Replace this subshell with a command under a guard, which ends the command and all its child
# processes when this script ends, also by SIGKILL.
guarded() {
    [ -n "$guard" ] || exec "$@"
    exec "$guard" -I -S "$here/mxresnet/process_guard.py" --new-session $$ "$@"
}

# End the commands that still run. A guard ends when no process of its command is left. Not by the
# ids in "running": the signal may have come before they were noted there.
stop_running() {
    local pids
    while pids=$(jobs -pr) && [ -n "$pids" ]; do
        # shellcheck disable=SC2086  # several words
        kill -TERM $pids 2>/dev/null || true
        sleep 0.1
    done
}

# Run functions at the same time, each in a process of its own, and show the elapsed time. The first
# function that fails ends the script.
run_step() {
    local text=$1 started=$SECONDS reported=-30 name pid
    shift
    step=$((step + 1))
    for name in "$@"; do
        guarded "$here/setup_env.sh" --step "$name" "$python" >"$venv/$name.log" 2>&1 </dev/null &
        running[$!]=$name
    done
    while [ ${#running[@]} -gt 0 ]; do
        if [ -t 2 ]; then
            printf '\r[%d/%d] %s: %d s ' "$step" "$steps" "$text" $((SECONDS - started)) >&2
        elif [ $((SECONDS - reported)) -ge 30 ]; then
            reported=$SECONDS
            log "[$step/$steps] $text: $((SECONDS - started)) s"
        fi
        sleep 0.2
        for pid in "${!running[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            name=${running[$pid]}
            unset "running[$pid]"
            wait "$pid" || report_failure "$text" "$venv/$name.log"
        done
    done
    [ ! -t 2 ] || printf '\r' >&2
    log "[$step/$steps] $text: done in $((SECONDS - started)) s"
}

report_failure() {
    local text=$1 file=$2 cause
    [ ! -t 2 ] || log ""
    case $file in */fetch_python.log) die "$(explain_missing_python "$file")" ;; esac
    cause=$(explain_failure "$file")
    [ -z "$cause" ] || die "step '$text' failed: $cause (output: $file)"
    tail -n 15 "$file" >&2
    die "step '$text' failed; the complete output is in $file." \
        "Fix the cause and run this command again: it continues."
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# Install the packages of a file in requirements/. A file from the package index, or from a folder
# that pip's settings name, is refused if its hash is not listed there. Only wheels: building a
# source distribution would download packages that no hash covers.
pip_install_locked() {
    local file=$1
    shift
    pip install --progress-bar off --require-hashes --only-binary :all: --no-deps \
        -r "$here/requirements/$file" "$@"
}

# Register this project in the environment; its packages are already installed.
pip_install_project() {
    pip install --no-index --no-deps --no-build-isolation -e "$here"
}

install_build_requirements() {
    "$python" -m venv "$venv" && pip_install_locked build.txt --no-compile && restore_numpy_bool
}

# Python imports mxresnet when it starts, before MXNet, also while Horovod is compiled: MXNet needs
# that on Python 3.12 (mxresnet/numpy_bool.py).
restore_numpy_bool() {
    local packages
    packages=$(packages_folder)
    case $packages in
        */python3.12/*) printf '%s\n' "$here" "import mxresnet" >"$packages/mxresnet.pth" ;;
    esac
}

# Write a wrapper around cmake, because Horovod's build has no option for these:
# - remove the argument VERBOSE=1, which ninja does not accept;
# - compile several source files at once and without debug information: less than half the time;
# - compile with g++ 13, which does not include two headers that Horovod relies on, and with g++ 14,
#   which refuses an assignment to a constant member in FlatBuffers, although it is never used.
write_cmake_wrapper() {
    cat >"$1" <<'EOF'
#!/bin/sh
for argument do
    shift
    [ "$argument" = VERBOSE=1 ] || set -- "$@" "$argument"
done
if [ "$1" != --build ]; then
    sed -i 's/const size_type count_;/size_type count_;/' \
        "$1/third_party/flatbuffers/include/flatbuffers/stl_emulation.h"
    set -- "$@" -DCMAKE_UNITY_BUILD=ON \
        -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O3 -DNDEBUG -include cstdint -include stdexcept"
fi
exec cmake "$@"
EOF
    chmod +x "$1"
}

# Succeed if Horovod is installed in the version of requirements/horovod.txt.
has_horovod() {
    local wanted
    wanted=$(grep -o '^horovod==[^ ]*' "$here/requirements/horovod.txt")
    pip list --format=freeze | grep -xF "$wanted" >/dev/null
}

# Print the folder of Horovod's wheel. It differs for everything that the wheel depends on.
wheel_folder() {
    local key
    key=$({ fingerprint && echo "$venv" && "$venv/bin/python" --version; } | sha256sum)
    echo "$venv/wheels/${key:0:16}"
}

# Do not use pip's cache: Horovod's library contains the paths of the environment in which it was
# built.
build_horovod() {
    local wheels
    ! has_horovod || return 0
    # The wheel may have been built before an interruption.
    wheels=$(wheel_folder)
    [ ! -d "$wheels" ] || return 0
    rm -rf "$venv/wheels"
    write_cmake_wrapper "$venv/bin/horovod-cmake"
    [ "$device" = cpu ] || export_horovod_gpu_build || return
    PATH=$venv/bin:$PATH HOROVOD_CMAKE=$venv/bin/horovod-cmake \
        CMAKE_GENERATOR=Ninja MAKEFLAGS=-j$(nproc) \
        HOROVOD_WITH_MXNET=1 HOROVOD_WITH_MPI=1 \
        HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
        with_driver pip wheel --no-cache-dir --no-deps --no-build-isolation --require-hashes \
        --no-binary horovod -w "$venv/wheels/new" -r "$here/requirements/horovod.txt" &&
        mv "$venv/wheels/new" "$wheels"
}

install_packages() { pip_install_locked cpu.txt --no-compile && pip_install_project; }

install_horovod_and_check() {
    local wheel
    for wheel in "$(wheel_folder)"/horovod-*.whl; do
        [ ! -f "$wheel" ] || pip install --no-index --no-deps "$wheel" || return
    done
    rm -rf "$venv/wheels"
    pip uninstall --yes cmake ninja || return # 80 MB, and only Horovod's build needs them
    pip check || return
    # Importing the packages also writes the byte code of the modules that are used: pip would
    # compile every module of every package, which takes several times as long.
    # Open MPI needs two variables to run as a single process without mpirun: it then finds its
    # files in .venv, not where it was built, and starts no daemon over ssh.
    with_driver env -u PYTHONDONTWRITEBYTECODE DEVICE="$device" \
        OPAL_PREFIX="$venv" OMPI_MCA_ess_singleton_isolated=1 "$venv/bin/python" -c '
import os
import cv2, mlperf_logging.mllog, mpi4py.MPI, scipy.io, sklearn.datasets, tqdm
import horovod.mxnet as hvd
import nvidia.dali.fn, nvidia.dali.pipeline
assert hvd.mpi_built(), "Horovod was built without MPI"
assert os.environ["DEVICE"] == "cpu" or hvd.nccl_built(), "Horovod was built without NCCL"' ||
        return
    rm -rf "$venv/driver-stub"
}

install_dev_packages() { pip_install_locked dev.txt; }

# Check the machine, and let only one process at a time work in .venv.
lock_environment() {
    check_machine
    find_python
    guard=${python:-$(any_python)}
    if [ -z "$python$guard" ] && ! command -v uv >/dev/null; then
        die "$(python_is_missing), nor uv to download it: $(ways_to_a_python)"
    fi
    # mkdir shows the reason.
    mkdir -p "$venv" && [ -w "$venv" ] ||
        die "$venv cannot be written, and the environment is not complete:" \
            "let its owner run ./setup_env.sh, or use a copy of your own"
    trap stop_running EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 131' QUIT
    trap 'exit 143' TERM
    # Two commands that are started together must not build the same environment at the same time.
    # All processes of a step hold the lock too: it is free when none of them is left.
    exec 9>"$venv/.lock"
    if ! flock -n 9; then
        log "another setup_env.sh is working in $venv: waiting for it"
        guarded flock 9 &
        wait $!
    fi
}

# Set python to a suitable one, which uv downloads if the machine has none.
provide_python() {
    [ -n "$python" ] || find_python
    [ -z "$python" ] || return 0
    log "$(python_is_missing): uv downloads Python 3.11 into $standalone" \
        "(30 MB from ${UV_PYTHON_INSTALL_MIRROR:-$releases})"
    steps=$((steps + 1))
    run_step "Python 3.11, for this folder only" fetch_python
    rm -rf "$venv/uv" "$venv/uv-cache"
    find_python
    [ -n "$python" ] || die "the Python that uv downloaded into $standalone does not run here" \
        "(found: ${rejected:-none}): $(ways_to_a_python)"
}

# Remove an environment for another device: its MXNet is in the same folder as that for this one.
remove_other_environment() {
    local made=cpu # by versions of this script that made no other
    [ ! -f "$venv/.device" ] || made=$(cat "$venv/.device")
    if [ "$made" != "$device" ] && [ -d "$venv/lib" ]; then
        log "The environment in $venv is for the $made: it is removed"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name .lock ! -name python -exec rm -rf {} +
    fi
    echo "$device" >"$venv/.device"
}

make_environment() {
    export SETUP_DEVICE=$device # for the processes of the steps
    if [ "$device" = gpu ] && ! is_current .ready; then
        check_gpus
        find_nvcc
        find_cuda_cxx
        size="5 GB"
    fi
    lock_environment
    if ! is_current .ready; then
        rm -f "$venv/.ready" "$venv/.ready-dev"
        remove_other_environment
        provide_python
        log "Making the environment in $venv for the ${device^^} with $("$python" --version)" \
            "(about $size, some minutes; only once)"
        if [ "$device" = gpu ]; then
            run_step "MXNet, CUDA libraries, DALI and build tools" install_gpu_packages
            run_step "Horovod and batch norms (compiled from source)" \
                build_horovod build_batch_norms
        else
            run_step "MXNet, Open MPI and build tools" install_build_requirements
            run_step "Horovod (compiled from source), DALI and other packages" \
                build_horovod install_packages
        fi
        run_step "installing Horovod, checking the environment" install_horovod_and_check
        fingerprint >"$venv/.ready"
    fi
    if $dev && ! is_current .ready-dev; then
        step=0 steps=1
        run_step "packages for the tests and the linters" install_dev_packages
        fingerprint >"$venv/.ready-dev"
    fi
}

main() {
    local active
    # Find the packages without importing them: the GPU build of MXNet cannot be imported on a
    # machine without a GPU.
    local has_both='
import importlib.util as u
raise SystemExit(not (u.find_spec("mxnet") and u.find_spec("horovod.mxnet")))'
    case ${1-} in
        --launcher-python)
            python=$(any_python)
            if [ -z "$python" ]; then
                check_python_variables
                steps=0
                share_certificates
                lock_environment
                provide_python
            fi
            echo "$python"
            return
            ;;
        --step) # for this script only: run one function of a step
            python=$3 device=${SETUP_DEVICE-}
            "$2"
            return
            ;;
        --dev) dev=true ;;
        "") ;;
        *) die "$1 is not an option: use --dev or --launcher-python" ;;
    esac
    check_device_variable
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && [ "${active#"$venv"/}" = "$active" ] &&
        "$active" -c "$has_both" 2>/dev/null; then
        echo "$active"
        return
    fi
    choose_device
    if ! is_current .ready || { $dev && ! is_current .ready-dev; }; then
        ignore_redirections
        check_python_variables
        share_certificates
        make_environment
    fi
    echo "$venv/bin/python"
}

main "$@"
