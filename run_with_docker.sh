#!/usr/bin/env bash
# run_trials.sh in a container on this machine.
#
#   CONT=<image> DATADIR=<folder> DGXSYSTEM=<name> ./run_with_docker.sh [flags of python -m mxresnet]
#
#   CONT           image that has this project in its working directory, and MXNet and Horovod in its python
#   DATADIR        data set, seen as /data, read-only
#   DGXSYSTEM      picks config_<name>.sh of this checkout: what it exports is handed to the container
#   LOGDIR         (./results), seen as /results
#   DOCKER_GPUS    GPUs given to the container, as docker run --gpus has it (all; none for the CPU configurations)
#   NEXP, SEED, SEEDS, CLEAR_CACHES, DATESTAMP, SUBMISSION_*  as for run_trials.sh, and so is the exit status
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./run_trials.sh
container=mxresnet_$$

# Names of what the configuration exports: what it adds to an empty environment.
names_of_config() {
    # shellcheck disable=SC2016  # for the inner shell
    env -i PATH="$PATH" bash -c 'set -euo pipefail; source "$1"; compgen -e' - "./config_$DGXSYSTEM.sh" |
        grep -vxE 'PATH|PWD|OLDPWD|SHLVL|_'
}

# Sets handed_over: -e options for the configuration's variables, the user's settings and the submission's, with their values here.
load_config() {
    local name settings
    # shellcheck disable=SC2016  # the table's backquotes
    settings=$(sed -n 's/^| `--[^|]*| `\([A-Z0-9_]*\)` |.*/\1/p' docs/settings.md)
    # shellcheck source=config_CPU_digits.sh
    source "./config_$DGXSYSTEM.sh"
    export DATAROOT=/data
    # shellcheck disable=SC2046,SC2086  # names
    for name in $(read_by_a_rank $(names_of_config) $settings $(compgen -e SUBMISSION_) DATAROOT | sort -u); do
        case $name in LOG_FILE | LOGDIR | SEED | TRIAL | DATESTAMP) ;; *) handed_over+=(-e "$name=${!name}") ;; esac
    done
    handed_over+=(-e "CONFIG_LOADED=$DGXSYSTEM" -e LOGDIR=/results)
}

start_container() {
    local options=() mode=ro
    [ -z "${BUILTIN_DATA:-}" ] || mode=rw
    case $DGXSYSTEM in CPU*) DOCKER_GPUS=${DOCKER_GPUS:-none} ;; esac
    [ "${DOCKER_GPUS:-all}" = none ] || options+=(--gpus "${DOCKER_GPUS:-all}")
    [ ! -d /dev/infiniband ] || options+=(--device /dev/infiniband)
    trap 'docker rm --force "$container" >/dev/null 2>&1 || true' EXIT
    docker run --detach --rm --name "$container" --init "${options[@]}" --network host --ipc host \
        --ulimit memlock=-1 --ulimit stack=67108864 --security-opt seccomp=unconfined \
        --volume "$(realpath "$DATADIR"):/data:$mode" --volume "$(realpath "$LOGDIR"):/results" \
        --entrypoint sleep "$CONT" infinity >/dev/null || die "docker cannot start a container of CONT=$CONT"
    docker exec "$container" test -x run_and_time.sh || die "CONT=$CONT has no run_and_time.sh in its working directory"
}

one_trial() {
    exec docker exec "${handed_over[@]}" -e "SEED=$SEED" -e "TRIAL=$TRIAL" -e "DATESTAMP=$DATESTAMP" -e "CACHE_CLEARED=$CACHE_CLEARED" \
        "$container" ./run_and_time.sh "$@"
}

# The cache is the machine's: whoever may start a privileged container may drop it from there.
drop_caches() {
    sync && { { echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null ||
        docker run --rm --privileged --entrypoint sh "$CONT" -c 'echo 3 >/proc/sys/vm/drop_caches' >/dev/null 2>&1; }
}

run_python() {
    # shellcheck disable=SC2016  # for the container's shell
    docker exec "$container" sh -c '"$(./setup_env.sh)" "$@"' - "$@"
}

main() {
    local handed_over=() there=/results
    [ -n "${CONT:-}" ] || die "CONT is not set: name the image"
    [ -n "${DGXSYSTEM:-}" ] || die "DGXSYSTEM is not set: it picks config_<DGXSYSTEM>.sh"
    check_system
    [ -d "${DATADIR:-}" ] || die "DATADIR=${DATADIR:-} is not a folder: it holds the data set"
    command -v docker >/dev/null || die "docker is not found on PATH"
    load_config
    mkdir -p "${LOGDIR:=./results}" || die "LOGDIR=$LOGDIR cannot be made"
    start_container
    trials "$@"
}

main "$@"
