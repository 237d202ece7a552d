# shellcheck shell=bash
# series.sh - the QEMU series that vmcache supports, each ready to run.
#
# Used by: lab.sh, and test.
# Promises: a series that cannot be had ends the script with a message.
# Needs: root for 7.2.

# shellcheck source=scripts/lib/deps.sh
source "$(dirname "${BASH_SOURCE[0]}")/deps.sh"
# shellcheck source=scripts/lib/chroot.sh
source "$LIB_DIR/chroot.sh"

# shellcheck disable=SC2034  # for the scripts that source this file
readonly SERIES_ALL=(10.0 7.2)

# series_prepare VAR SERIES DIRECTORY...   puts into array VAR the words that,
#   in front of a program's name (qemu-img, qemu-system-x86_64, vmcache, ...),
#   run it where SERIES is installed. The directories, which must exist, are
#   visible there under their own paths.
series_prepare() {
    local -n series_prepare_out=$1
    local series=$2 tree words=()
    shift 2
    case $series in
        10.0) deps_install qemu ;;
        7.2)
            deps_install chroot
            chroot_qemu72 tree
            chroot_prefix words "$tree" "$@"
            ;;
        *) die "no QEMU series '$series' (there are: ${SERIES_ALL[*]})" ;;
    esac
    # shellcheck disable=SC2034  # the caller's array
    series_prepare_out=("${words[@]}")
}
