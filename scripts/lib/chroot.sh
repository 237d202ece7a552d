# shellcheck shell=bash
# chroot.sh - QEMU 7.2 as Debian 12 ships it, in a directory tree of its own:
# Debian does not install two QEMU series side by side.
#
# Used by: series.sh, and test for qemu-img and qemu-io of 7.2.
# Promises: the tree is made once per version of this recipe. A command run in
# it sees the host's /dev, /proc, /sys, /tmp and the directories it is given at
# their own paths, so paths mean the same inside and outside; those mounts live
# in a private mount namespace and end with the command. Inside a network
# namespace (netns_exec, or a prefix from netns_prefix) it works the same.
# Needs: root.

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# chroot_qemu72 VAR          path of the tree in VAR; makes it when it is not there
chroot_qemu72() {
    local -n chroot_qemu72_path=$1
    chroot_qemu72_path=$CACHE_DIR/chroots/bookworm-qemu-7.2-$(recipe_hash chroot_build)
    cache_make "$chroot_qemu72_path" "making a Debian 12 tree with QEMU 7.2 (once, about a minute)" chroot_build
}

# chroot_build DIRECTORY
chroot_build() {
    local root=$1 log=$1.log mirror=()
    ((EUID == 0)) || die "making the QEMU 7.2 tree needs root"
    [[ -z ${VMCACHE_DEBIAN_MIRROR:-} ]] || mirror=("$VMCACHE_DEBIAN_MIRROR")
    on_exit rm -rf --one-file-system "$log" "$root.scratch"
    mkdir -p "$root.scratch" # mmdebstrap's, which a kill would leave in /tmp
    child_run "${BOX[@]}" \
        env "TMPDIR=$root.scratch" mmdebstrap --mode=root --variant=minbase \
        --include=qemu-system-x86,qemu-utils,qemu-block-extra,seabios \
        --dpkgopt=force-unsafe-io \
        --dpkgopt=path-exclude=/usr/share/man/* \
        --dpkgopt=path-exclude=/usr/share/locale/* \
        --dpkgopt=path-exclude=/usr/share/doc/* \
        bookworm "$root" "${mirror[@]}" >"$log" 2>&1 </dev/null || {
        tail -n 20 "$log" >&2
        die "making the QEMU 7.2 tree failed (the lines above are the end of its log)"
    }
    chroot "$root" qemu-img --version | grep --quiet 'version 7\.2\.' ||
        die "the tree made from Debian 12 does not hold QEMU 7.2"
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
