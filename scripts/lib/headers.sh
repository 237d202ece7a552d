# shellcheck shell=bash
# headers.sh - the headers of each QEMU series that vmcache supports, from Debian's
# source packages, and C compiled against them.
#
# Used by: gen-layouts, for what is known about QEMU's structures, and bench, for
# the driver it compares with.
# Promises: a header tree is complete or not there. The system's apt configuration
# stays as it is. Nothing of QEMU is built or linked.
# Needs: package groups build, headers, script.

# shellcheck source=scripts/lib/qemu_source.sh
source "$(dirname "${BASH_SOURCE[0]}")/qemu_source.sh"

# headers_tree VAR SERIES    the series' headers, fetched where they are not there
headers_tree() {
    local -n headers_tree_path=$1
    local directory
    directory=$CACHE_DIR/qemu-sources/$2-$(recipe_hash fetch_source qemu_source_fetch)
    cache_make "$directory" "headers of QEMU $2" fetch_source "$2"
    # shellcheck disable=SC2034  # the caller's variable
    headers_tree_path=$directory/tree
}

# headers_configure TREE BUILD   what the headers include and a build would make
headers_configure() {
    mkdir -p "$2/qapi"
    python3 -B "$1/scripts/qapi-gen.py" -b -o "$2/qapi" "$1/qapi/qapi-schema.json"
    write_config "$1" >"$2/config-host.h"
    : >"$2/config-poison.h"
}

# headers_compile TREE BUILD ARG...   gcc with the headers, after headers_configure
headers_compile() {
    local tree=$1 build=$2 cflags
    shift 2
    read -ra cflags < <(pkg-config --cflags glib-2.0)
    gcc -std=gnu11 -O2 -I "$build" -I "$tree/include" "${cflags[@]}" "$@"
}

# headers_floor VAR          benches/floor/floor.c for the series that bench runs
#   in, as a library to preload; its path in VAR
headers_floor() {
    local -n headers_floor_path=$1
    local source=$CHECKOUT_DIR/benches/floor/floor.c tree='' directory
    headers_tree tree "$DEPS_QEMU_SERIES"
    directory=$CACHE_DIR/floor/$(recipe_hash headers_floor_build headers_compile write_config -- \
        "$DEPS_QEMU_SERIES" "$(<"$source")")
    cache_make "$directory" "compiling a driver to compare with" headers_floor_build "$tree" "$source"
    # shellcheck disable=SC2034  # the caller's variable
    headers_floor_path=$directory/libfloor.so
}

headers_floor_build() {
    local build=''
    work_dir build floor
    headers_configure "$1" "$build"
    mkdir -p "$3"
    # Lazy: the dynamic linker must not look for QEMU's functions in a program that has none.
    headers_compile "$1" "$build" -D_GNU_SOURCE -Wall -shared -fPIC -Wl,-z,lazy -o "$3/libfloor.so" "$2" ||
        die "could not compile $2"
}

# fetch_source SERIES DIRECTORY   the parts of the tree that are needed
fetch_source() {
    local series=$1 out=$2 tarball
    mkdir -p "$out/tree"
    qemu_source_fetch "$series" "$out"
    tarball=("$out"/qemu_*.orig.tar.xz)
    # Headers, the schema and its generator, and the reference drivers' files.
    tar --extract --file "${tarball[0]}" --directory "$out/tree" --strip-components 1 \
        --wildcards '*/VERSION' '*/include' '*/qapi/*.json' '*/scripts/qapi*' \
        '*/block/*.h' '*/block/qcow2.c' '*/block/raw-format.c' '*/block/copy-on-read.c'
    # Debian's changes must not be missed, should they ever touch these files.
    if tar --extract --to-stdout --file "$out"/qemu_*.debian.tar.xz --wildcards 'debian/patches/*' |
        grep --extended-regexp --quiet '^\+\+\+ [^/]*/(include/block/|block/(qcow2|raw-format|copy-on-read)\.c)'; then
        die "Debian patches block layer headers of QEMU $series: apply debian/patches here first"
    fi
    rm -f "$out"/qemu_*
}

# write_config TREE   config-host.h without running configure.
#
# Of the settings that configure makes, the structures vmcache looks into depend
# on these only: CONFIG_POSIX and CONFIG_LINUX say where it runs; CONFIG_IOVEC
# that struct iovec is libc's; CONFIG_ATOMIC64 is the width of Stat64, in
# BlockDriverState behind every member vmcache uses. The others that occur in the
# headers concerned (CONFIG_DEBUG_MUTEX, CONFIG_TSAN, CONFIG_SAFESTACK) are
# debugging builds, change only what lies behind those members too, and are off
# in Debian's.
write_config() {
    local major minor micro
    IFS=. read -r major minor micro <"$1/VERSION"
    cat <<CONFIG
#define CONFIG_POSIX 1
#define CONFIG_LINUX 1
#define CONFIG_IOVEC 1
#define CONFIG_ATOMIC64 1
#define QEMU_VERSION_MAJOR $major
#define QEMU_VERSION_MINOR $minor
#define QEMU_VERSION_MICRO $micro
CONFIG
}
