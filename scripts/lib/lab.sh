# shellcheck shell=bash
# lab.sh - a compute node and a storage node on one machine: the base image on a
# real NFS server in a network namespace of its own, and measured boots from it.
#
# Used by: demo, bench-boot, test. They share it so that every figure of boot
# time and of what the base served comes about in one way.
# Promises: lab_open leaves everything ready; all of it ends with the script.
# Each boot starts from a fresh overlay in $LAB_DIR, leaves its result in
# $LAB_DIR/NAME/result.json (the keys: report.py) and its logs beside it.
# What the base served is counted twice: by QEMU's trace of the base's node, and
# by the byte counter of the only network device between QEMU and the server.
# Needs: root, and what lab_deps installs.

# shellcheck source=scripts/lib/series.sh
source "$(dirname "${BASH_SOURCE[0]}")/series.sh"
# shellcheck source=scripts/lib/nfs.sh
source "$LIB_DIR/nfs.sh"
# shellcheck source=scripts/lib/boot.sh
source "$LIB_DIR/boot.sh"

# Where cargo puts what it builds.
LAB_BUILD_DIR=${CARGO_TARGET_DIR:-$CHECKOUT_DIR/target}/release
# Seconds a guest may take to come up. On an idle machine it is 15 to 20.
LAB_BOOT_LIMIT=${LAB_BOOT_LIMIT:-300}

# Set by lab_open:
#   LAB_SERIES  the QEMU series          LAB_DIR   the run's own directory
#   LAB_IMAGE   the base, local path     LAB_BASE  the base, nfs:// address
#   LAB_NS      its network namespace    LAB_RUN   array: prefix of commands
LAB_SERIES='' LAB_DIR='' LAB_IMAGE='' LAB_BASE='' LAB_NS=''
LAB_RUN=()

# lab_deps                   installs all that building and booting need
lab_deps() { deps_install script build qemu nfs image net; }

# lab_build                  builds library and command line
lab_build() {
    # rustup's directory need not be in PATH, for one under sudo.
    PATH=$PATH:${HOME:-/root}/.cargo/bin
    command -v cargo >/dev/null ||
        die "cargo is not there: install Rust (https://rustup.rs) and start again"
    step "cargo build --release --locked" \
        child_run cargo build --release --locked --manifest-path "$CHECKOUT_DIR/Cargo.toml" >&2 ||
        die "cargo build failed"
}

# lab_open NAME SERIES       prepares QEMU, image, namespace and NFS server for a
#   run called NAME
lab_open() {
    local name=$1 series=$2 words=() directories
    ((EUID == 0)) || die "lab_open needs root"
    image_base LAB_IMAGE
    work_dir LAB_DIR "$name"
    LAB_SERIES=$series
    directories=("${LAB_IMAGE%/*}" "${LAB_DIR%/*}" "$CHECKOUT_DIR")
    mkdir -p "$LAB_BUILD_DIR"
    [[ $LAB_BUILD_DIR == "$CHECKOUT_DIR"/* ]] || directories+=("$LAB_BUILD_DIR")
    series_prepare words "$series" "${directories[@]}"

    netns_create LAB_NS
    step "starting nfs-ganesha in its own network namespace" lab_serve
    LAB_BASE=nfs://127.0.0.1$LAB_IMAGE
    netns_prefix LAB_RUN "$LAB_NS"
    LAB_RUN+=("${words[@]}")
    # From here on nobody reads the base from the disk, whichever boots first.
    cat "$LAB_IMAGE" >/dev/null
}

lab_serve() {
    # shellcheck disable=SC2034  # it ends with the script
    local server
    nfs_start server "$LAB_NS" 127.0.0.1 "${LAB_IMAGE%/*}"
}

# lab_run COMMAND ARG...     runs a command where the base is reachable and
#   LAB_SERIES is installed
lab_run() { "${LAB_RUN[@]}" "$@"; }

# lab_vmcache ARG...         runs the vmcache command line there
lab_vmcache() { lab_run "$LAB_BUILD_DIR/vmcache" "$@"; }

# lab_cache_create CACHE [OPTION...]   an empty cache of the NFS base
lab_cache_create() {
    local cache=$1
    shift
    lab_vmcache create -b "$LAB_BASE" -F raw "$@" "$cache" >&2 ||
        die "vmcache create failed for $cache"
}

# lab_boot KIND NAME [CACHE] boots once. KIND:
#     raw      overlay on the local file
#     nfs      overlay on the NFS base
#     vmcache  overlay on the NFS base, read through CACHE by driver=vmcache
#     stock    overlay on CACHE as an ordinary qcow2, without the library
#   Returns 1, and says why, when the guest did not come up.
lab_boot() {
    local kind=$1 name=$2 cache=${3:-}
    local directory=$LAB_DIR/$name overlay=$LAB_DIR/$name/overlay.qcow2
    local base=$LAB_BASE format=raw drive before after status=0
    # shellcheck disable=SC2034  # named to boot_guest
    local qemu=("${LAB_RUN[@]}" qemu-system-x86_64)
    local collect=(--name "$name" --kind "$kind" --qemu "$LAB_SERIES" --directory "$directory")
    mkdir -p "$directory"

    drive=if=none,id=disk0,driver=qcow2,file.filename=$(lab_comma "$overlay")
    case $kind in
        raw)
            base=$LAB_IMAGE
            collect+=(--base-driver file --base-filename "$LAB_IMAGE")
            ;;
        nfs) collect+=(--base-driver nfs) ;;
        vmcache)
            # shellcheck disable=SC2034
            qemu=("${LAB_RUN[@]}" "$LAB_BUILD_DIR/vmcache" exec qemu-system-x86_64)
            drive+=,backing.driver=vmcache,backing.file.filename=$(lab_comma "$cache")
            collect+=(--base-driver nfs --stats-before "$directory/stats-before.json"
                --stats-after "$directory/stats.json" --info "$directory/info.json")
            lab_vmcache stats --output=json "$cache" >"$directory/stats-before.json" ||
                die "vmcache stats failed for $cache"
            ;;
        stock)
            base=$cache format=qcow2
            collect+=(--base-driver nfs)
            ;;
        *) die "lab_boot: no kind '$kind'" ;;
    esac
    lab_run qemu-img create -q -f qcow2 -b "$base" -F "$format" "$overlay" ||
        die "qemu-img could not make an overlay on $base"

    netns_bytes before "$LAB_NS" lo
    boot_guest "$directory" "$LAB_BOOT_LIMIT" qemu "$drive" || status=$?
    netns_bytes after "$LAB_NS" lo
    if [[ $kind == vmcache ]]; then
        lab_vmcache stats --output=json "$cache" >"$directory/stats.json" ||
            die "vmcache stats failed for $cache"
        lab_vmcache info --output=json "$cache" >"$directory/info.json" ||
            die "vmcache info failed for $cache"
    fi
    rm -f "$overlay"
    python3 "$LIB_DIR/report.py" boot "${collect[@]}" --wire-bytes "$((after - before))" \
        >"$directory/result.json" || die "the figures of boot $name are not complete"
    return "$status"
}

# lab_comma TEXT             prints TEXT as a value in a -drive option
lab_comma() { printf '%s' "${1//,/,,}"; }

# lab_verify CACHE           plain qemu-img, without the library: no error in the
#   image, its header's chain opens, and its content is the base's. Returns 1 and
#   says what is wrong.
lab_verify() {
    local cache=$1 said
    said=$(netns_exec "$LAB_NS" env -u LD_PRELOAD qemu-img check -f qcow2 "$cache" 2>&1) || {
        say "qemu-img check $cache: $said"
        return 1
    }
    said=$(netns_exec "$LAB_NS" env -u LD_PRELOAD qemu-img info --backing-chain "$cache" 2>&1) || {
        say "qemu-img info --backing-chain $cache: $said"
        return 1
    }
    # What the cache does not hold is read from the local file here: the same
    # bytes as over NFS, but its 4 GiB of holes cost nothing.
    said=$(env -u LD_PRELOAD qemu-img compare --image-opts \
        "driver=raw,file.driver=file,file.filename=$(lab_comma "$LAB_IMAGE")" \
        "driver=qcow2,file.driver=file,file.filename=$(lab_comma "$cache"),backing.driver=raw,backing.file.driver=file,backing.file.filename=$(lab_comma "$LAB_IMAGE")" \
        2>&1) || {
        say "qemu-img compare of base and $cache: $said"
        return 1
    }
}

# lab_results_owner FILE     gives a result to the user who called sudo
lab_results_owner() {
    [[ -z ${SUDO_UID:-} ]] || chown "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$1"
}
