# shellcheck shell=bash
# tools.sh - cargo's own tools that Debian has no package of, each in the version
# that is named here, built once and kept in the cache directory.
#
# Used by: scripts/fuzz, scripts/deny and scripts/sanitize.

# shellcheck source=scripts/lib/deps.sh
source "$(dirname "${BASH_SOURCE[0]}")/deps.sh"

# shellcheck disable=SC2034  # for the scripts that source this file
readonly CARGO_FUZZ_VERSION=0.13.2 CARGO_DENY_VERSION=0.20.2

PATH=$PATH:${HOME:-/root}/.cargo/bin

# tool_cargo VAR CRATE VERSION   a program of crates.io, its path in VAR
tool_cargo() {
    local -n tool_cargo_path=$1
    local directory=$CACHE_DIR/tools/$2-$3
    cache_make "$directory" "building $2 $3 (cargo install, some minutes)" tool_cargo_build "$2" "$3"
    # shellcheck disable=SC2034  # it is the caller's
    tool_cargo_path=$directory/bin/$2
}

tool_cargo_build() {
    # Without optimisation: they run for seconds, and would be optimised for minutes.
    child_run cargo install --debug --quiet --locked --version "$2" --root "$3" \
        --target-dir "$CACHE_DIR/target/tools" "$1" >&2 ||
        die "cargo could not install $1 $2"
}
