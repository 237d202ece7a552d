# shellcheck shell=bash
# netns.sh - network namespaces of a run's own: exact byte counters, no clash of
# ports, and shaped links between nodes that are not there.
#
# Used by: lab.sh, nfs.sh, and test for links of a given speed.
# Promises: a namespace is named by the pid of a process that holds it (its
# handle). It has no name in /run/netns, so it goes with that process, and that
# with the script, even after `kill -9`. The handle `host` stands for the
# machine's own namespace everywhere.
# Needs: root.

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# netns_create VAR           a new namespace with lo up, its handle in VAR
netns_create() {
    local -n netns_create_handle=$1
    local handle i
    ((EUID == 0)) || die "a network namespace needs root"
    child_start handle unshare --net -- sleep infinity </dev/null
    for ((i = 0; i < 500; i++)); do
        [[ $(readlink "/proc/$handle/ns/net") == "$(readlink /proc/self/ns/net)" ]] || break
        sleep 0.01
    done
    ((i < 500)) || die "could not make a network namespace"
    netns_exec "$handle" ip link set dev lo up
    # shellcheck disable=SC2034  # the caller's variable
    netns_create_handle=$handle
}

# netns_delete NS            ends it, with the devices in it
netns_delete() { child_stop "$1"; }

# netns_prefix VAR NS        puts into array VAR the words that, in front of a
#   command, run it in NS; the command keeps the prefix's pid
netns_prefix() {
    local -n netns_prefix_out=$1
    netns_prefix_out=()
    # shellcheck disable=SC2034  # the caller's array
    [[ $2 == host ]] || netns_prefix_out=(nsenter "--net=/proc/$2/ns/net" --)
}

# netns_exec NS COMMAND ARG...   runs COMMAND in NS
netns_exec() {
    local netns_exec_prefix
    netns_prefix netns_exec_prefix "$1"
    shift
    "${netns_exec_prefix[@]}" "$@"
}

# netns_link NS_A ADDRESS_A NS_B ADDRESS_B [RATE]   a cable between two
#   namespaces: a veth pair, each end with the address (CIDR) and sending at most
#   RATE (tc's syntax; default 1gbit; `none`: unshaped). The device is called
#   veth-vmcache in both, so a namespace has one link.
netns_link() {
    local a=$1 address_a=$2 b=$3 address_b=$4 rate=${5:-1gbit} ns
    [[ $a != host && $b != host ]] || die "netns_link: only between namespaces of this run"
    netns_exec "$a" ip link add veth-vmcache type veth peer name veth-vmcache netns "$b"
    netns_exec "$a" ip address add "$address_a" dev veth-vmcache
    netns_exec "$b" ip address add "$address_b" dev veth-vmcache
    for ns in "$a" "$b"; do
        netns_exec "$ns" ip link set dev veth-vmcache up
        [[ $rate == none ]] ||
            netns_exec "$ns" tc qdisc add dev veth-vmcache root tbf \
                rate "$rate" burst 256k latency 50ms
    done
}

# netns_bytes VAR NS DEVICE [rx|tx]   bytes that DEVICE has received (default)
#   or sent so far
netns_bytes() {
    local -n netns_bytes_out=$1
    local process=$2 device=$3 column=1 name rest values
    [[ $process != host ]] || process=self
    [[ ${4:-rx} == rx ]] || column=9
    while IFS=: read -r name rest; do
        read -ra values <<<"$rest"
        if [[ ${name// /} == "$device" ]]; then
            # shellcheck disable=SC2034  # the caller's variable
            netns_bytes_out=${values[column - 1]}
            return 0
        fi
    done <"/proc/$process/net/dev"
    die "no network device $device in namespace $2"
}
