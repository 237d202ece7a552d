# shellcheck shell=bash
# qemu_source.sh - Debian's source packages of QEMU, fetched by apt with package
# lists of their own: the system's apt configuration stays as it is.
#
# Used by: headers.sh and build-qemu.
# Promises: what Debian has signed, of the series asked for, or the script ends
# with a message.

# shellcheck source=scripts/lib/deps.sh
[[ -n ${DEPS_QEMU_SERIES:-} ]] || source "$(dirname "${BASH_SOURCE[0]}")/deps.sh"

readonly QEMU_SOURCE_MIRROR=${VMCACHE_DEBIAN_MIRROR:-http://deb.debian.org/debian}

# qemu_source_suite SERIES   prints the Debian suite whose source package has it
qemu_source_suite() {
    case $1 in
        7.2) echo bookworm ;;
        10.0) echo trixie ;;
        10.2) echo sid ;;
        *) die "no Debian suite is known to have the source of QEMU '$1'" ;;
    esac
}

# qemu_source_fetch SERIES DIRECTORY   the newest source package of the series:
#   qemu_*.orig.tar.xz and qemu_*.debian.tar.xz in DIRECTORY
qemu_source_fetch() {
    local series=$1 out=$2 suite apt version
    suite=$(qemu_source_suite "$series")
    mkdir -p "$out/apt/lists/partial" "$out/apt/cache/archives/partial"
    printf 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
        "$QEMU_SOURCE_MIRROR" "$suite" >"$out/apt/sources.list"
    # apt's own user cannot write into a private cache directory.
    apt=(
        --option "Dir::Etc::sourcelist=$out/apt/sources.list"
        --option Dir::Etc::sourceparts=-
        --option "Dir::State::lists=$out/apt/lists"
        --option "Dir::Cache=$out/apt/cache"
        --option "APT::Sandbox::User=$(id -un)"
    )
    apt-get "${apt[@]}" --quiet=2 update >&2 ||
        die "no package lists of $suite from $QEMU_SOURCE_MIRROR"
    # A suite can have several series at a time.
    version=$(apt-cache "${apt[@]}" showsrc --only-source qemu |
        sed -n "s/^Version: \\(.*:${series//./\\.}[.+].*\\)/\\1/p" | sort --version-sort | tail -n 1)
    [[ -n $version ]] || die "$suite has no source package of QEMU $series"
    say "fetching the source of qemu $version from $suite"
    (cd "$out" && apt-get "${apt[@]}" --quiet=2 --download-only source "qemu=$version" >&2) ||
        die "could not fetch qemu $version"
    rm -rf "$out/apt"
}
