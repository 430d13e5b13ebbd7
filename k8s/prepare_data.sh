#!/usr/bin/env bash
# The program of the data pod: wait for the archives, then make and verify the records. After an
# interruption, a new pod continues.
#
#   prepare_data.sh ARCHIVES RECORDS
#
# Whoever copies the archives creates the file ARCHIVES/complete after the last one. If an archive
# is wrong, the pod reports the error, removes that file, and waits for it again.
set -euo pipefail
archives=${1:?folder of the archives} records=${2:?folder for the records}
[ "${archives:0:1}" = / ] || archives=$PWD/$archives
[ "${records:0:1}" = / ] || records=$PWD/$records
script=${BASH_SOURCE[0]}
[ ! -L "$script" ] || script=$(readlink -f "$script")
CDPATH='' builtin cd -- "$(dirname -- "$script")/.."
python=$(./setup_env.sh)
# Not empty after an error in the archives. Finished records are ignored then: they were not made
# from the present archives.
archives_were_wrong=""

finished() { [ -f "$records/val.json" ] && [ -f "$records/train.json" ]; }

# An evicted pod keeps running for some seconds after its successor has started.
wait_for_the_previous_pod() {
    local status=0
    exec 9>>"$records/.lock"
    flock -n 9 || status=$?
    [ "$status" = 1 ] || return 0 # 0: this pod has the lock; else the file system has no locks
    echo "another data pod is working in $records: waiting for its end"
    flock 9 &
    wait $! # in the background, so that a signal is handled at once
}

wait_for_archives() {
    local waited
    for ((waited = 0; ; waited += 5)); do
        [ -n "$archives_were_wrong" ] || ! finished || return 0
        [ ! -f "$archives/complete" ] || return 0
        [ $((waited % 600)) != 0 ] ||
            echo "waiting for $archives/complete; the folder contains:" \
                "$(find "$archives" -mindepth 1 -maxdepth 1 -printf '%f ')"
        sleep 5 &
        wait $!
    done
}

# Make the records, unless they are finished and no new archives are complete.
make_records() {
    local status
    while
        wait_for_archives
        [ -f "$archives/complete" ]
    do
        status=0
        "$python" -m prepare.imagenet "$archives" "$records" || status=$?
        case $status in
            0) return ;;
            # Keep this pod: a new pod would fail in the same way, and its log would replace this
            # one.
            1 | 2 | 3)
                archives_were_wrong=1
                rm -f "$archives/complete"
                echo "fix the errors above, then create $archives/complete again"
                ;;
            *) exit "$status" ;; # A write failed, or a signal came: a new pod may succeed.
        esac
    done
}

trap 'exit 143' TERM INT
mkdir -p "$archives" "$records"
wait_for_the_previous_pod
make_records
"$python" -m prepare.verify "$records"
echo "the records in $records are complete; the archives may be deleted"
