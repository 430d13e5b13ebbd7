# shellcheck shell=bash
# The launcher of an MPIJob (mpi-operator's kubeflow.org/v2beta1 over ssh, training-operator's v1 over kubectl exec): starts
# ./run_and_time.sh as every rank on the workers. Sourced by run_and_time.sh, whose say, die and start_ranks it
# uses, with launch_common.sh.
#
#   DGXSYSTEM       the configuration; its ranks must be the host file's
#   LAUNCH_WAIT     seconds to wait for the workers' names and ssh (300)
#   MPI_INTERFACE   network interface between the pods (that of the default route)
hostfile=/etc/mpi/hostfile

in_a_launcher() { [ "${K_MPI_JOB_ROLE:-}" = launcher ] || { [ -z "${K_MPI_JOB_ROLE:-}" ] && [ -f "$hostfile" ]; }; }

# Prints the ranks that the host file has room for.
slots() {
    awk -v default_slots="${OMPI_MCA_orte_set_default_slots:-1}" \
        '!/^ *(#|$)/ {n = default_slots; for (i = 2; i <= NF; i++) if (sub(/^slots=/, "", $i)) n = $i; total += n} END {print total + 0}' "$hostfile"
}

# Prints the ranks that the configuration is for.
ranks_of_config() {
    # shellcheck disable=SC2016  # for the other shell
    from_config 'echo $((DGXNGPU * ${DGXNNODES:-1}))'
}

# Prints why a worker cannot be reached, or nothing.
why_unreachable() {
    local host=$1 port
    getent hosts "$host" >/dev/null || { echo "the name is not known"; return; }
    port=$(ssh -G "$host" </dev/null 2>/dev/null | awk '$1 == "port" {print $2}')
    # It has to say who it is: the kernel lets callers in for an sshd that is stopped.
    timeout 2 bash -c "exec {to}<>/dev/tcp/$host/${port:-22}; head -c 4 <&\$to" 2>/dev/null | grep -q SSH- || echo "nothing answers on port ${port:-22}"
}

# Prints which workers do not answer and why.
unreachable_workers() {
    local host why
    [ -f "$hostfile" ] || return 0
    while read -r host; do
        why=$(why_unreachable "$host")
        [ -z "$why" ] || printf '%s: %s; ' "$host" "$why"
    done < <(awk '!/^ *(#|$)/ {print $1}' "$hostfile")
}

# Operators may start the launcher before the workers' names are known or their sshd is up, and mpirun tries a name once.
wait_for_workers() {
    local host why started=$SECONDS said=-1 limit=${LAUNCH_WAIT:-300}
    [ -z "${OMPI_MCA_plm_rsh_agent:-}" ] || return 0 # not ssh: kubectl exec, and its operator has waited
    command -v ssh >/dev/null || die "there is no ssh here: the image needs openssh-client"
    while read -r host; do
        while why=$(why_unreachable "$host"); [ -n "$why" ]; do
            [ $((SECONDS - started)) -lt "$limit" ] ||
                die "$host cannot be reached after $limit s: $why (kubectl describe pod ${host%%.*}; LAUNCH_WAIT is how long to wait)"
            if [ $(((SECONDS - started) / 30)) != "$said" ]; then
                said=$(((SECONDS - started) / 30))
                say "waiting for $host: $why"
            fi
            sleep 1
        done
    done < <(awk '!/^ *(#|$)/ {print $1}' "$hostfile")
}

# Open MPI 5 does not read what operators say in OMPI_MCA_*: it would run every rank in the launcher.
check_mpirun() {
    local version
    version=$("$1" --version 2>/dev/null | head -n 1) || true
    [[ $version == *"(Open MPI) 4."* ]] || die "$1 is '${version:-not Open MPI}': the operator's host file needs Open MPI 4.1"
}

# Sets travels: -x NAME for every variable here that a rank reads. Nothing else of this pod's environment gets to the workers.
choose_what_travels() {
    local python=$1 name settings
    settings=$("$python" -c 'from mxresnet.config import FIELDS; print(*(f.metadata["env"] for f in FIELDS.values()))') || exit
    travels=()
    # shellcheck disable=SC2086  # names
    for name in $(read_by_a_rank $settings PATH LD_LIBRARY_PATH PYTHONPATH STARTED_BY); do travels+=(-x "$name"); done
}

# The interface of the default route: pods have others (docker0, a service mesh's) on which they do not reach each other.
choose_interface() {
    local interface=${MPI_INTERFACE:-}
    [ -n "$interface" ] || interface=$(awk '$2 == "00000000" {print $1; exit}' /proc/net/route)
    interfaces=()
    [ -n "$interface" ] || return 0
    interfaces=(--mca btl_tcp_if_include "$interface" --mca oob_tcp_if_include "$interface")
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
}

# Starts the ranks; returns their status. Rank 0 prints RESULT.
launch_job() {
    local python=$1 mpirun ranks wanted interfaces=() travels=()
    shift
    [ -f "$hostfile" ] || die "this is an MPIJob's launcher without $hostfile: the operator writes it into the first container only"
    ranks=$(slots)
    wanted=$(ranks_of_config) || exit
    [ "$ranks" = "$wanted" ] || die "$hostfile has room for $ranks ranks (replicas x slotsPerWorker) and DGXSYSTEM=$DGXSYSTEM is for $wanted (DGXNNODES x DGXNGPU): make them the same"
    mpirun=$(dirname "$python")/mpirun
    [ -x "$mpirun" ] || mpirun=$(command -v mpirun) || die "mpirun is not found beside $python nor on PATH: install Open MPI 4.1"
    check_mpirun "$mpirun"
    wait_for_workers
    choose_interface
    export EXPECTED_RANKS=$ranks STARTED_BY=launcher PATH="${python%/*}:$PATH"
    choose_what_travels "$python"
    say "starting $ranks ranks on $(awk '!/^ *(#|$)/ {print $1}' "$hostfile" | wc -l) workers"
    # A full path, so that workers find orted in the same place. Keepalives: a link that is cut is noticed after
    # 8 + 3 x 2 seconds, and not after 8 minutes; unless something was on its way, in which case ssh notices: orted ends
    # with its session. A worker that answered just now and does not any more is not waited for minutes.
    start_ranks "$mpirun" -np "$ranks" --hostfile "$hostfile" --map-by slot --bind-to none --wdir "$PWD" \
        --mca orte_launch_agent "setpriv --pdeathsig TERM orted" \
        --mca plm_rsh_args "-o ConnectionAttempts=3 -o ConnectTimeout=4 ${OMPI_MCA_plm_rsh_args:-}" \
        --mca oob_tcp_keepalive_time 8 --mca oob_tcp_keepalive_intvl 2 --mca oob_tcp_keepalive_probes 3 \
        "${interfaces[@]}" "${travels[@]}" "$PWD/run_and_time.sh" "$@"
}
