#!/usr/bin/env bash
# Runs one rank's command bound to the cores, the memory and the network adapter near its GPU.
#
#   ./bind.sh [options] [--] command [arguments]
#
#   --cpu=node             (default) the cores of the NUMA node that its GPU is attached to
#   --cpu=exclusive        its own share of them: the ranks on a node divide its cores
#   --cpu=exclusive,nosmt  the same, and of each core only one hardware thread
#   --cpu=off              any core
#   --mem=node | off       (default node) take memory from that node first
#   --ib=single | off      (default off) let UCX use only the adapter nearest to the GPU, unless UCX_NET_DEVICES is set
#
# Where a GPU is attached comes from nvidia-smi and /sys, never from a list of machines; a rank without a GPU gets one of
# the nodes in turn. Only CPUs that this process may use are given out, so the launcher must not have bound the rank before
# (mpirun --bind-to none, srun --cpu-bind=none). What cannot be bound is left alone, and what was done is said on one line.
set -euo pipefail

root=${BIND_ROOT:-} # the tests' stand-in for /
cpu=node mem=node ib=off
declare -A allowed=() node_cpus=()
nodes=() gpus=() notes=()

die() { printf 'bind.sh: %s\n' "$*" >&2; exit 2; }

# 0-2,5 to 0 1 2 5, and back.
expand() { local part; for part in ${1//,/ }; do seq "${part%-*}" "${part#*-}"; done; }
compress() {
    printf '%s\n' "$@" | sort -n | awk '
        NR > 1 && $1 == last + 1 {last = $1; next}
        NR > 1 {printf "%s%s,", first, (last > first ? "-" last : "")}
        {first = last = $1}
        END {printf "%s%s\n", first, (last > first ? "-" last : "")}'
}

parse_options() {
    while [ $# -gt 0 ]; do
        case $1 in
            --cpu=* | --mem=* | --ib=* | --cluster=*) set_option "${1%%=*}" "${1#*=}"; shift ;;
            --cpu | --mem | --ib | --cluster) [ $# -gt 1 ] || die "$1 wants a value"; set_option "$1" "$2"; shift 2 ;;
            --) shift; break ;;
            -*) die "$1 is not an option: --cpu, --mem and --ib are" ;;
            *) break ;;
        esac
    done
    [ $# -gt 0 ] || die "no command: ./bind.sh [--cpu=...] [--mem=...] [--ib=...] -- command"
    command=("$@")
}

set_option() {
    case $1=$2 in
        --cpu=node | --cpu=exclusive | --cpu=exclusive,nosmt | --cpu=off) cpu=$2 ;;
        --mem=node | --mem=off) mem=$2 ;;
        --ib=single | --ib=off) ib=$2 ;;
        --cluster=*) die "--cluster is not needed: the adapters come from this machine's /sys" ;;
        *) die "$1=$2: see the head of this file for what $1 may be" ;;
    esac
}

# The CPUs that this process may use, by NUMA node; nodes without any do not count.
look_at_cpus() {
    local key value folder list id part
    while read -r key value; do
        [ "$key" != Cpus_allowed_list: ] || for id in $(expand "$value"); do allowed[$id]=1; done
    done <"$root/proc/self/status"
    for id in $(for folder in "$root"/sys/devices/system/node/node[0-9]*; do echo "${folder##*/node}"; done | sort -n); do
        read -r list <"$root/sys/devices/system/node/node$id/cpulist" 2>/dev/null || list=""
        for part in $(expand "$list"); do [ -z "${allowed[$part]:-}" ] || node_cpus[$id]+="$part "; done
        [ -z "${node_cpus[$id]:-}" ] || nodes+=("$id")
    done
    if [ ${#nodes[@]} -eq 0 ]; then # a kernel without NUMA
        nodes=(0)
        node_cpus[0]=$(printf '%s\n' "${!allowed[@]}" | sort -n | paste -sd ' ')
    fi
}

# PCI addresses as in /sys, in the order in which the ranks take the GPUs.
look_at_gpus() {
    local index uuid bus wanted visible=${CUDA_VISIBLE_DEVICES-all}
    local -A bus_of=()
    local found=()
    command -v nvidia-smi >/dev/null || return 0
    while IFS=', ' read -r index uuid bus; do
        [[ $bus == *:*:*.* ]] || continue
        bus=${bus,,}
        bus=${bus: -12} # nvidia-smi gives the PCI domain 8 digits, /sys gives it 4
        found+=("$bus")
        bus_of[$index]=$bus bus_of[$uuid]=$bus
    done < <(nvidia-smi --query-gpu=index,uuid,pci.bus_id --format=csv,noheader 2>/dev/null)
    if [ "$visible" = all ]; then
        gpus=("${found[@]}")
    else
        for wanted in ${visible//,/ }; do [ -z "${bus_of[$wanted]:-}" ] || gpus+=("${bus_of[$wanted]}"); done
    fi
    # The CUDA library numbers as nvidia-smi does only when it is told to.
    [ ${#gpus[@]} -eq 0 ] || export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID}
}

# Sets node to that of a rank: its GPU's where that is known and has CPUs for us, else one of the nodes in turn.
node_of() {
    node=-1
    [ "$1" -ge ${#gpus[@]} ] || read -r node 2>/dev/null <"$root/sys/bus/pci/devices/${gpus[$1]}/numa_node" || node=-1
    [ -n "${node_cpus[$node]:-}" ] || node=${nodes[$1 * ${#nodes[@]} / ranks]}
}

# Prints the CPUs of my share of my node's cores.
share_of_cores() {
    local place=0 mates=0 other id sibling list core count cores=()
    local -A seen=()
    for ((other = 0; other < ranks; other++)); do
        node_of "$other"
        [ "$node" != "$my_node" ] || { [ "$other" -ge "$rank" ] || place=$((place + 1)); mates=$((mates + 1)); }
    done
    for id in ${node_cpus[$my_node]}; do
        [ -z "${seen[$id]:-}" ] || continue
        core=""
        read -r list 2>/dev/null <"$root/sys/devices/system/cpu/cpu$id/topology/thread_siblings_list" || list=$id
        for sibling in $(expand "$list"); do
            [ -z "${allowed[$sibling]:-}" ] || { seen[$sibling]=1; core+="$sibling "; }
        done
        [ "$cpu" != exclusive,nosmt ] || core=${core%% *}
        cores+=("$core")
    done
    count=${#cores[@]}
    [ "$count" -ge "$mates" ] || return 1
    echo "${cores[@]:place * count / mates:(place + 1) * count / mates - place * count / mates}"
}

# Prints the names of the working adapters that are nearest to a rank's GPU: most of the way over PCI in common, then the
# same NUMA node. InfiniBand ports come before Ethernet ports, which on many machines are for storage.
nearest_adapters() {
    local gpu="" gpu_node="" folder state layer path numa score best=-1 names="" a b i
    if [ "$1" -lt ${#gpus[@]} ]; then
        gpu=$(readlink -f "$root/sys/bus/pci/devices/${gpus[$1]}")
        read -r gpu_node 2>/dev/null <"$gpu/numa_node" || gpu_node=""
    fi
    for folder in "$root"/sys/class/infiniband/*; do
        read -r state 2>/dev/null <"$folder/ports/1/state" || continue
        [[ $state == *ACTIVE* ]] || continue
        read -r layer 2>/dev/null <"$folder/ports/1/link_layer" || layer=""
        path=$(readlink -f "$folder/device")
        read -r numa 2>/dev/null <"$path/numa_node" || numa=-1
        IFS=/ read -ra a <<<"$gpu"
        IFS=/ read -ra b <<<"$path"
        for ((i = 0; i < ${#a[@]} && i < ${#b[@]}; i++)); do [ "${a[i]}" = "${b[i]}" ] || break; done
        score=$((2 * i + (numa >= 0 && ${gpu_node:--2} == numa)))
        [ "$layer" != InfiniBand ] || score=$((score + 1000))
        if [ "$score" -gt "$best" ]; then best=$score names=${folder##*/}; elif [ "$score" -eq "$best" ]; then names+=" ${folder##*/}"; fi
    done
    echo "$names"
}

# Sets adapter: the ranks with the same nearest adapters divide them.
choose_adapter() {
    local mine other place=0 mates=0 names
    mine=$(nearest_adapters "$rank")
    for ((other = 0; other < ranks; other++)); do
        [ "$(nearest_adapters "$other")" != "$mine" ] || { [ "$other" -ge "$rank" ] || place=$((place + 1)); mates=$((mates + 1)); }
    done
    read -ra names <<<"$mine"
    [ ${#names[@]} -eq 0 ] || adapter=${names[place * ${#names[@]} / mates]}
}

# Sets binder to what runs a command so bound; a container may forbid either tool what it does.
choose_binder() {
    local cpus=$1 wanted=()
    [ -z "$cpus" ] || wanted+=("--physcpubind=$cpus")
    [ "$mem" = off ] || wanted+=("--preferred=$my_node")
    if [ ${#wanted[@]} -gt 0 ] && command -v numactl >/dev/null && numactl "${wanted[@]}" true >/dev/null 2>&1; then
        binder=(numactl "${wanted[@]}")
        [ "$mem" = off ] || notes+=("memory of node $my_node first")
        return
    fi
    [ "$mem" = off ] || [ ${#nodes[@]} -eq 1 ] || notes+=("memory not bound (numactl is missing or forbidden)")
    [ -n "$cpus" ] || return 0
    if command -v taskset >/dev/null && taskset -c "$cpus" true >/dev/null 2>&1; then
        binder=(taskset -c "$cpus")
    else
        notes+=("CPUs NOT bound (numactl and taskset are missing or forbidden)")
    fi
}

main() {
    local command rank ranks node my_node cpus="" list="" adapter="" binder=()
    parse_options "$@"
    rank=${LOCAL_RANK:-${OMPI_COMM_WORLD_LOCAL_RANK:-${SLURM_LOCALID:-0}}}
    ranks=${OMPI_COMM_WORLD_LOCAL_SIZE:-${SLURM_STEP_TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${DGXNGPU:-1}}}}
    ranks=${ranks%%[!0-9]*} # Slurm: 8(x4) for 8 on each of 4 machines
    [ "$ranks" -gt "$rank" ] || ranks=$((rank + 1))
    look_at_cpus
    look_at_gpus
    node_of "$rank"
    my_node=$node
    case $cpu in
        node) list=${node_cpus[$my_node]} ;;
        exclusive*) list=$(share_of_cores) || { list=${node_cpus[$my_node]}; notes+=("fewer cores than ranks: shared"); } ;;
    esac
    # shellcheck disable=SC2086  # a list of numbers
    [ -z "$list" ] || cpus=$(compress $list)
    [ "$ib" = off ] || [ -n "${UCX_NET_DEVICES:-}" ] || choose_adapter
    [ -z "$adapter" ] || { export UCX_NET_DEVICES=$adapter:1; notes+=("adapter $adapter"); }
    choose_binder "$cpus"
    [ "$rank" -ge ${#gpus[@]} ] || notes=("GPU ${gpus[$rank]}" "${notes[@]}")
    printf 'bind.sh: rank %s of %s here: NUMA node %s, CPUs %s%s\n' \
        "$rank" "$ranks" "$my_node" "${cpus:-any}" "$([ ${#notes[@]} -eq 0 ] || printf ', %s' "${notes[@]}")" >&2
    exec "${binder[@]}" "${command[@]}"
}

main "$@"
