# shellcheck shell=bash
# libvirt.sh - a real libvirtd with nothing of the machine's own: Debian 13's, in a
# copy of a tree, with its configuration, sockets, guests and all.
#
# Used by: libvirt-boot.
# Promises: daemon and guests run in process, mount and network namespaces of
# their own and end with the handle of the copy (chroot_copy). They see no
# control groups. Guests run as the user that Debian has for them.
# Needs: root, what chroot_libvirt needs.

# shellcheck source=scripts/lib/chroot.sh
source "$(dirname "${BASH_SOURCE[0]}")/chroot.sh"

# Debian's user for guests.
# shellcheck disable=SC2034  # for the scripts that source this file
readonly LIBVIRT_USER=libvirt-qemu

# libvirt_start HANDLE       starts the daemons in a copy
libvirt_start() {
    local handle=$1 i
    chroot_in "$handle" sh -euc '
        mkdir -p /run/libvirt
        echo "cgroup_controllers = []" >>/etc/libvirt/qemu.conf
        virtlogd --daemon
        libvirtd --daemon
    ' || die "the libvirt daemons did not start"
    for ((i = 0; i < 300; i++)); do
        libvirt_virsh "$handle" version >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    chroot_in "$handle" virsh --connect qemu:///system version >&2 || true
    die "libvirtd does not answer (the lines above are virsh's)"
}

# libvirt_virsh HANDLE ARG...   virsh on it
libvirt_virsh() {
    local handle=$1
    shift
    chroot_in "$handle" virsh --quiet --connect qemu:///system "$@"
}

# libvirt_wait HANDLE DOMAIN STATE SECONDS   waits until a domain has the state
libvirt_wait() {
    local handle=$1 domain=$2 state=$3 i
    for ((i = 0; i < $4 * 5; i++)); do
        [[ $(libvirt_virsh "$handle" domstate "$domain") != "$state" ]] || return 0
        sleep 0.2
    done
    return 1
}
