# shellcheck shell=bash
# deps.sh - installs the Debian packages that the build, the demo and the tests
# need.
#
# Used by: scripts/install-deps and every script, each with the groups it needs.
# Promises: when deps_install returns, every package of the group is installed;
# when that cannot be had, the script ends with a message that names it. With
# all there it costs a fraction of a second. Packages come by apt only, through
# sudo when not root, and one line says which. No service that comes with a
# package is started or left enabled.

[[ -z ${VMCACHE_DEPS_SH:-} ]] || return 0
VMCACHE_DEPS_SH=1

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# The QEMU series that group `qemu` stands for.
readonly DEPS_QEMU_SERIES=10.0

# netbase: rpcbind finds its port in /etc/services.
readonly -A DEPS_PACKAGES=(
    [build]="gcc libc6-dev pkg-config libclang-dev"
    [fuzz]="g++ libc6-dev"
    [valgrind]="valgrind"
    [headers]="dpkg-dev libglib2.0-dev"
    [qemu]="qemu-system-x86 qemu-utils qemu-block-extra seabios"
    [qemu-build]="gcc libc6-dev pkg-config dpkg-dev patch ninja-build flex bison python3-venv libglib2.0-dev libfdt-dev libpixman-1-dev liburing-dev libaio-dev libnfs-dev"
    [nfs]="nfs-ganesha nfs-ganesha-vfs rpcbind netbase"
    [image]="mmdebstrap e2fsprogs extlinux syslinux-common fdisk mount"
    [chroot]="mmdebstrap mount"
    [net]="iproute2"
    [script]="python3 util-linux"
    [test]="python3 python3-libnbd nbdkit strace e2fsprogs util-linux mount"
    [trace]="strace"
    [bench]="python3-matplotlib python3-tqdm nbdkit"
    [lint]="shellcheck"
    [deb]="debhelper dpkg-dev"
    [units]="systemd"
    [shells]="zsh fish"
)

# deps_groups                prints the names of all groups, one a line
deps_groups() { printf '%s\n' "${!DEPS_PACKAGES[@]}" | sort; }

# deps_install GROUP...      installs what is missing of these groups
deps_install() {
    local group package wanted=() missing=() newer=()
    for group; do
        [[ -n ${DEPS_PACKAGES[$group]:-} ]] ||
            die "no package group '$group' (there are: $(deps_groups | tr '\n' ' '))"
        for package in ${DEPS_PACKAGES[$group]}; do wanted+=("$package"); done
    done
    deps_missing missing "${wanted[@]}"

    if [[ " $* " == *" qemu "* ]] && ! deps_qemu_fits; then
        # Not there, or another series: take them all from one suite.
        for package in ${DEPS_PACKAGES[qemu]}; do newer+=("$package"); done
    fi
    # A QEMU of the right series that apt does not know serves as well.
    if ((${#newer[@]} == 0)) && [[ " $* " == *" qemu "* ]]; then
        deps_without missing "${DEPS_PACKAGES[qemu]}"
    else
        deps_without missing "${newer[*]}"
    fi

    ((${#missing[@]} == 0)) || deps_apt_install "${missing[@]}"
    if ((${#newer[@]})); then
        deps_install_qemu "${newer[@]}"
        deps_qemu_fits ||
            die "QEMU $DEPS_QEMU_SERIES is not what runs after installing ${newer[*]}:" \
                "$(qemu-system-x86_64 --version 2>&1 | head -n 1); is another one earlier in PATH?"
    fi
}

# deps_missing VAR PACKAGE...   the ones that are not installed, in array VAR
deps_missing() {
    local -n deps_missing_out=$1
    local status name package
    local -A installed=()
    shift
    while read -r status name; do
        [[ $status != installed ]] || installed[$name]=1
    done < <(dpkg-query --show --showformat '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    deps_missing_out=()
    for package; do
        [[ -n ${installed[$package]:-} || " ${deps_missing_out[*]} " == *" $package "* ]] ||
            deps_missing_out+=("$package")
    done
}

# deps_without VAR "PACKAGE..."   takes the packages out of array VAR
deps_without() {
    local -n deps_without_out=$1
    local kept=() package
    for package in "${deps_without_out[@]}"; do
        [[ " $2 " == *" $package "* ]] || kept+=("$package")
    done
    deps_without_out=("${kept[@]}")
}

# deps_qemu_fits             succeeds when QEMU of the series runs, with its NFS
#                            driver, whoever installed it
deps_qemu_fits() {
    local program version
    for program in qemu-system-x86_64 qemu-img qemu-io qemu-nbd; do
        version=$("$program" --version 2>/dev/null) || return 1
        [[ $version =~ [[:space:]]${DEPS_QEMU_SERIES//./\\.}\. ]] || return 1
    done
    # The NFS driver is a module of its own package, which --help lists even when
    # it is not there: hand it an address without a path, which it refuses.
    [[ $(qemu-img info nfs:/// 2>&1) != *"Unknown protocol"* ]]
}

deps_install_qemu() {
    local id='' codename=''
    # shellcheck source=/dev/null
    [[ ! -r /etc/os-release ]] || {
        id=$(source /etc/os-release && echo "${ID:-}")
        codename=$(source /etc/os-release && echo "${VERSION_CODENAME:-}")
    }
    case $id/$codename in
        debian/bookworm)
            if ! deps_has_suite bookworm-backports; then
                say "adding bookworm-backports to /etc/apt/sources.list.d (it has QEMU $DEPS_QEMU_SERIES)"
                as_root tee /etc/apt/sources.list.d/bookworm-backports.sources >/dev/null <<'SOURCES'
Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
                deps_apt_update
            fi
            deps_apt_install --target-release bookworm-backports "$@"
            ;;
        debian/trixie) deps_apt_install "$@" ;;
        *) die "QEMU $DEPS_QEMU_SERIES is needed and apt has it on Debian 12 and 13 only" \
            "(this is $id $codename): install it and start again" ;;
    esac
}

# deps_has_suite SUITE       succeeds when apt's sources name the suite
deps_has_suite() {
    # shellcheck disable=SC2016  # the names are apt's
    apt-get indextargets --format '$(RELEASE) $(SUITE) $(CODENAME)' 2>/dev/null |
        tr ' ' '\n' | grep --quiet --line-regexp --fixed-strings "$1"
}

deps_apt() {
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get --option DPkg::Lock::Timeout=300 --quiet=2 "$@"
}

deps_apt_update() {
    say "reading the package lists (apt-get update)"
    deps_apt update >&2 || die "apt-get update failed: check the network and /etc/apt"
}

# deps_apt_install [OPTION...] PACKAGE...
deps_apt_install() {
    command -v apt-get >/dev/null || die "apt-get is not there; install these by hand: $*"
    say "installing with apt: $*"
    local services=() log
    deps_missing services nfs-ganesha rpcbind nbdkit
    deps_hold_services
    # The second try is for package lists that are empty or out of date.
    log=$(mktemp)
    on_exit rm -f "$log"
    if ! deps_apt install --no-install-recommends --yes "$@" >"$log" 2>&1; then
        deps_apt_update
        deps_apt install --no-install-recommends --yes "$@" >"$log" 2>&1 || {
            tail -n 15 "$log" >&2
            die "apt could not install: $* (the lines above are the end of what it said)"
        }
    fi
    deps_release_services
    deps_disable_services "${services[@]}"
}

# A server must not start, and be open to the network, because a package of it
# was installed: Debian asks policy-rc.d before starting one.
readonly DEPS_POLICY=/usr/sbin/policy-rc.d

deps_hold_services() {
    # One of ours that is still there belongs to a script that was killed, or to
    # one that installs now and has no objection.
    [[ ! -e $DEPS_POLICY ]] || grep --quiet '^# vmcache:' "$DEPS_POLICY" || return 0
    DEPS_HELD=1
    on_exit deps_release_services
    printf '#!/bin/sh\n# vmcache: until the installation that runs now has ended\nexit 101\n' |
        as_root tee "$DEPS_POLICY" >/dev/null
    as_root chmod 755 "$DEPS_POLICY"
}

deps_release_services() {
    [[ -n ${DEPS_HELD:-} ]] || return 0
    DEPS_HELD=
    as_root rm -f "$DEPS_POLICY"
}

# deps_disable_services PACKAGE...   for packages that were not there before
deps_disable_services() {
    local package
    [[ -d /run/systemd/system ]] || return 0
    for package; do
        case $package in
            nfs-ganesha) as_root systemctl --quiet disable nfs-ganesha.service ;;
            rpcbind) as_root systemctl --quiet disable rpcbind.service rpcbind.socket ;;
        esac 2>/dev/null || true
    done
}
