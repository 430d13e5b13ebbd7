#!/usr/bin/env bash
# The data pod's work: waits until the archives are there, then makes and verifies the records. Safe to interrupt.
#
#   prepare_data.sh ARCHIVES RECORDS
#
# Whoever hands over the archives says that they are complete by making the file ARCHIVES/complete.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
archives=${1:?folder of the archives} records=${2:?folder for the records}
python=$(./setup_env.sh)

trap 'exit 143' TERM INT
mkdir -p "$archives" "$records"
for ((waited = 0; ; waited += 5)); do
    [ ! -f "$records/val.json" ] || [ ! -f "$records/train.json" ] || break
    [ ! -f "$archives/complete" ] || break
    [ $((waited % 600)) != 0 ] || echo "waiting for $archives/complete; so far there: $(find "$archives" -mindepth 1 -maxdepth 1 -printf '%f ')"
    sleep 5 & wait $! # so that a signal is heard at once
done
if [ -f "$archives/complete" ]; then
    # Status 4 and those of signals are worth another pod; a problem of the archives is not, but is shown again the same way.
    "$python" -m prepare.imagenet "$archives" "$records"
fi
"$python" -m prepare.verify "$records"
echo "the records in $records are complete; the archives may be deleted"
