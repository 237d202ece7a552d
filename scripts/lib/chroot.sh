# shellcheck shell=bash
# chroot.sh - Debian releases in directory trees of their own, each with the QEMU
# it ships: Debian does not install two QEMU series side by side, and a package or
# a libvirt daemon that is tried there leaves the machine as it is.
#
# Used by: series.sh, check-install and libvirt-boot, and test for qemu-img and
# qemu-io of 7.2.
# Promises: a tree is made once per version of this recipe, and only read from
# then on. A command run in it sees the host's /dev, /proc, /sys, /tmp and the
# directories it is given at their own paths, so paths mean the same inside and
# outside; those mounts live in a private mount namespace and end with the
# command. Inside a network namespace (netns_exec, or a prefix from
# netns_prefix) it works the same.
# Needs: root.

[[ -z ${VMCACHE_CHROOT_SH:-} ]] || return 0
VMCACHE_CHROOT_SH=1

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=scripts/lib/netns.sh
source "$LIB_DIR/netns.sh"

readonly CHROOT_QEMU=qemu-system-x86,qemu-utils,qemu-block-extra,seabios
# The daemon with its QEMU driver, virsh, what checks XML, and AppArmor's compiler.
readonly CHROOT_LIBVIRT=libvirt-daemon,libvirt-daemon-driver-qemu,libvirt-daemon-log,libvirt-clients,libxml2-utils,apparmor

# chroot_qemu72 VAR          path of the tree in VAR; makes it when it is not there
chroot_qemu72() { chroot_make "$1" bookworm 7.2 "$CHROOT_QEMU" "QEMU 7.2"; }

# chroot_libvirt VAR         the same for Debian 13: QEMU 10.0 and libvirt 11.3
chroot_libvirt() {
    chroot_make "$1" trixie 10.0 "$CHROOT_QEMU,$CHROOT_LIBVIRT" "QEMU 10.0 and libvirt"
}

# chroot_make VAR SUITE SERIES PACKAGES WHAT
chroot_make() {
    local -n chroot_make_path=$1
    local suite=$2 series=$3 packages=$4 what=$5
    chroot_make_path=$CACHE_DIR/chroots/$suite-qemu-$series-$(recipe_hash chroot_build -- "$packages")
    cache_make "$chroot_make_path" "making a Debian $suite tree with $what (once, about a minute)" \
        chroot_build "$suite" "$series" "$packages"
}

# chroot_build SUITE SERIES PACKAGES DIRECTORY
chroot_build() {
    local suite=$1 series=$2 packages=$3 root=$4 log=$4.log mirror=()
    ((EUID == 0)) || die "making a Debian tree needs root"
    [[ -z ${VMCACHE_DEBIAN_MIRROR:-} ]] || mirror=("$VMCACHE_DEBIAN_MIRROR")
    on_exit rm -rf --one-file-system "$log" "$root.scratch"
    mkdir -p "$root.scratch" # mmdebstrap's, which a kill would leave in /tmp
    child_run "${BOX[@]}" \
        env "TMPDIR=$root.scratch" mmdebstrap --mode=root --variant=minbase \
        "--include=$packages" \
        --dpkgopt=force-unsafe-io \
        --dpkgopt=path-exclude=/usr/share/man/* \
        --dpkgopt=path-exclude=/usr/share/locale/* \
        --dpkgopt=path-exclude=/usr/share/doc/* \
        "$suite" "$root" "${mirror[@]}" >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        die "making the Debian $suite tree failed (the lines above are the end of its log)"
    }
    chroot "$root" qemu-img --version | grep --quiet "version ${series//./\\.}\\." ||
        die "the tree made from Debian $suite does not hold QEMU $series"
    rm -rf --one-file-system "$log" "$root.scratch"
}

# chroot_prefix VAR ROOT DIRECTORY...   puts into array VAR the words that, in
#   front of a command, run it in ROOT with the directories mounted at their own
#   paths. The command replaces the prefix's processes: a pid stays the same.
chroot_prefix() {
    local -n chroot_prefix_out=$1
    local root=$2
    shift 2
    # shellcheck disable=SC2034  # the caller's array
    chroot_prefix_out=(unshare --mount --propagation private --
        bash "$LIB_DIR/enter-chroot" "$root" "$@" --)
}

# chroot_exec ROOT DIRECTORY... -- COMMAND ARG...   runs a command in ROOT
chroot_exec() {
    local root=$1 directories=() prefix
    shift
    while (($#)) && [[ $1 != -- ]]; do
        directories+=("$1")
        shift
    done
    shift
    chroot_prefix prefix "$root" "${directories[@]}"
    "${prefix[@]}" "$@"
}

# chroot_copy VAR NS ROOT DIRECTORY...   a copy of ROOT that may be changed, in
#   network namespace NS and in process and mount namespaces of its own, its
#   handle in VAR. It has a /dev of its own, without disks. A DIRECTORY is mounted
#   at its own path, or, as FROM:TO, at another. What is started there ends with
#   the handle, and the copy too.
chroot_copy() {
    local -n chroot_copy_handle=$1
    local ns=$2 root=$3 handle state='' prefix i
    shift 3
    work_dir state chroot
    netns_prefix prefix "$ns"
    # shellcheck disable=SC2016  # expands inside
    child_start handle "${prefix[@]}" "${BOX[@]}" bash -euc '
        enter=$1 state=$2 lower=$3
        shift 3
        mount -t tmpfs -o mode=755 tmpfs "$state"
        mkdir "$state/upper" "$state/work" "$state/root" "$state/dev" "$state/dev/pts" "$state/dev/shm"
        mount -t overlay -o "lowerdir=$lower,upperdir=$state/upper,workdir=$state/work" overlay "$state/root"
        while read -r name minor; do
            mknod --mode=666 "$state/dev/$name" c "${minor%:*}" "${minor#*:}"
        done <<<"null 1:3
zero 1:5
full 1:7
random 1:8
urandom 1:9
tty 5:0
ptmx 5:2"
        ln -s /proc/self/fd "$state/dev/fd"
        mount -t devpts -o newinstance,mode=620,ptmxmode=666 devpts "$state/dev/pts"
        # As the first process of its namespace: bash takes in the processes that daemons leave.
        exec bash "$enter" "$state/root" "$state/dev:/dev" "$@" -- \
            bash -c ": >/.ready; sleep infinity & wait"
    ' chroot-copy "$LIB_DIR/enter-chroot" "$state" "$root" "$@" </dev/null
    for ((i = 0; i < 500; i++)); do
        if [[ $i -gt 0 ]] && chroot_in "$handle" test -e /.ready 2>/dev/null; then
            # shellcheck disable=SC2034  # the caller's variable
            chroot_copy_handle=$handle
            return 0
        fi
        kill -0 "$handle" 2>/dev/null || break
        sleep 0.02
    done
    die "could not make a copy of $root (needs overlayfs)"
}

# chroot_copy_pid VAR HANDLE   the first process of a copy, whose files are seen from
#   outside under /proc/PID/root
chroot_copy_pid() {
    local -n chroot_copy_pid_out=$1
    chroot_copy_pid_out=
    read -r chroot_copy_pid_out 2>/dev/null <"/proc/$2/task/$2/children" || true
    chroot_copy_pid_out=${chroot_copy_pid_out%% *}
    [[ -n $chroot_copy_pid_out ]]
}

# chroot_copy_prefix VAR HANDLE   puts into array VAR the words that, in front of a
#   command, run it in a copy
chroot_copy_prefix() {
    local -n chroot_copy_prefix_out=$1
    local pid
    chroot_copy_pid pid "$2" || return 125
    # shellcheck disable=SC2034  # the caller's array
    chroot_copy_prefix_out=(nsenter --target "$pid" --mount --net --pid --root --wdns=/ --)
}

# chroot_in HANDLE COMMAND ARG...   runs a command in a copy
chroot_in() {
    local prefix
    chroot_copy_prefix prefix "$1" || return 125
    shift
    "${prefix[@]}" "$@"
}
