#!/usr/bin/env bash
# The data pod's work: waits until the archives are there, then makes and verifies the records. Safe to interrupt.
#
#   prepare_data.sh ARCHIVES RECORDS
#
# Whoever hands over the archives says that they are complete by making the file ARCHIVES/complete. Where they are not what
# they should be, that is named, the file is removed, and the pod waits for it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
archives=${1:?folder of the archives} records=${2:?folder for the records}
python=$(./setup_env.sh)
refused="" # set once archives were no good: finished records are not made of those that are there now

finished() { [ -f "$records/val.json" ] && [ -f "$records/train.json" ]; }

# A pod that is told to leave its node goes on for some seconds beside the next one, which it would have turned away.
wait_for_the_last_pod() {
    local status=0
    exec 9>>"$records/.lock"
    flock -n 9 || status=$?
    [ "$status" = 1 ] || return 0 # it is ours, or the file system has no locks
    echo "another data pod is at work in $records: waiting for its end"
    flock 9 & wait $! # in the background so that a signal is heard at once
}

wait_for_archives() {
    local waited
    for ((waited = 0; ; waited += 5)); do
        [ -n "$refused" ] || ! finished || return 0
        [ ! -f "$archives/complete" ] || return 0
        [ $((waited % 600)) != 0 ] || echo "waiting for $archives/complete; so far there: $(find "$archives" -mindepth 1 -maxdepth 1 -printf '%f ')"
        sleep 5 & wait $!
    done
}

# Makes the records, unless they are there and nobody has said that archives are.
make_records() {
    local status
    while wait_for_archives; [ -f "$archives/complete" ]; do
        status=0
        "$python" -m prepare.imagenet "$archives" "$records" || status=$?
        case $status in
            0) return ;;
            1 | 2 | 3) # the next pod would find the same, and with the last one that a Job may have the log is gone: stay
                refused=1
                rm -f "$archives/complete"
                echo "what is named above has to be mended; then make $archives/complete again" ;;
            *) exit "$status" ;; # writing failed, or a signal: worth another pod
        esac
    done
}

trap 'exit 143' TERM INT
mkdir -p "$archives" "$records"
wait_for_the_last_pod
make_records
"$python" -m prepare.verify "$records"
echo "the records in $records are complete; the archives may be deleted"
