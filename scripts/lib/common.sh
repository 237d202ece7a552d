# shellcheck shell=bash
# common.sh - what every script here stands on: messages, the cache directory,
# clean-up, child processes, root.
#
# Used by: every other file in scripts/lib and every script in scripts/.
# Source it first; sourcing twice is harmless.
#
# Promises:
# - What on_exit was given runs in reverse order when the script ends, also on
#   an error, Ctrl-C or a TERM, even while a child runs.
# - A child started with child_start or child_run dies with this script, also
#   when the script itself gets `kill -9` (the kernel's parent-death signal).
# - cache_make leaves either the finished thing under its name or nothing; two
#   scripts that want it at once build it once.
# - Functions that start something set a variable of the caller, named by
#   their first argument, instead of printing: $(...) would start it in a
#   subshell, and it would die with that.

[[ -z ${VMCACHE_COMMON_SH:-} ]] || return 0
VMCACHE_COMMON_SH=1

LIB_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
# shellcheck disable=SC2034  # for the scripts that source this file
CHECKOUT_DIR=$(cd "$LIB_DIR/../.." && pwd -P)

# ---- messages: all on stderr, so that stdout stays for results -------------

# say TEXT...                one line of progress
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die TEXT...                one line saying what is wrong, exit 1
die() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# now_ms                     prints milliseconds since the epoch, without a fork
now_ms() {
    local t=${EPOCHREALTIME/[.,]/}
    printf '%s\n' "$((t / 1000))"
}

# step TEXT COMMAND...       runs COMMAND and says how long it took. COMMAND
#                            runs in this shell, so it may set variables.
step() {
    local text=$1 start end
    shift
    say "$text ..."
    start=${EPOCHREALTIME/[.,]/}
    "$@"
    end=${EPOCHREALTIME/[.,]/}
    printf '%s: %s: done in %d.%d s\n' "${0##*/}" "$text" \
        $(((end - start) / 1000000)) $(((end - start) / 100000 % 10)) >&2
}

# ---- clean-up --------------------------------------------------------------

EXIT_ACTIONS=()
CHILDREN=()

# on_exit COMMAND ARG...     remembers a command for the end of the script
on_exit() {
    local quoted
    printf -v quoted '%q ' "$@"
    EXIT_ACTIONS+=("$quoted")
}

run_exit_actions() {
    local status=$? i
    trap '' INT TERM HUP # a second Ctrl-C must not cut the clean-up short
    set +e
    for i in "${CHILDREN[@]}"; do child_stop "$i"; done
    for ((i = ${#EXIT_ACTIONS[@]} - 1; i >= 0; i--)); do eval "${EXIT_ACTIONS[i]}"; done
    exit "$status"
}

trap run_exit_actions EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# ---- child processes -------------------------------------------------------

# child_start VAR COMMAND ARG...   starts COMMAND in the background, its pid in
#   VAR. COMMAND must be a program, not a function. It is stopped at the end of
#   the script at the latest. Redirect output at the call.
child_start() {
    local -n child_start_pid=$1
    shift
    setpriv --pdeathsig KILL -- "$@" &
    child_start_pid=$!
    CHILDREN+=("$child_start_pid")
}

# A BOX in front of a command gives it process and mount namespaces of its own:
# whatever it starts ends with it, and its mounts too. unshare takes no TERM;
# a box is stopped by killing the first process in it.
# shellcheck disable=SC2034  # for the files that source this one
readonly BOX=(unshare --mount --propagation private --pid --fork --kill-child --mount-proc --)

# child_stop PID             stops a child: TERM, after 5 s KILL (a box: KILL).
#                            No error if it has gone already.
child_stop() {
    local pid=$1 name='' inside='' i
    read -r name 2>/dev/null <"/proc/$pid/comm" || true
    if [[ $name == unshare ]]; then
        read -r inside 2>/dev/null <"/proc/$pid/task/$pid/children" || true
    fi
    # shellcheck disable=SC2086  # one pid, or none
    if [[ -n $inside ]]; then
        kill -KILL $inside 2>/dev/null || true
    else
        kill -TERM "$pid" 2>/dev/null || true
    fi
    for ((i = 0; i < 250; i++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.02
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    child_forget "$pid"
}

child_forget() {
    local kept=() i
    for i in "${CHILDREN[@]}"; do [[ $i == "$1" ]] || kept+=("$i"); done
    CHILDREN=("${kept[@]}")
}

# child_run COMMAND ARG...   runs a program to its end and returns its status;
#   unlike a plain call, a TERM or Ctrl-C for this script takes effect at once.
child_run() {
    local child_run_pid status=0
    child_start child_run_pid "$@" <&0
    wait "$child_run_pid" || status=$?
    child_forget "$child_run_pid"
    return "$status"
}

# ---- the cache directory ---------------------------------------------------

# CACHE_DIR: where everything lives that is worth keeping between runs. Outside
# the checkout, safe to delete at any time.
CACHE_DIR=${VMCACHE_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/vmcache}
[[ $CACHE_DIR == /* ]] || CACHE_DIR=$PWD/$CACHE_DIR

# recipe_hash FUNCTION... [-- WORD...]   prints 12 hex digits over the bodies of
#   the named functions (comments do not count) and the words: the version of
#   what they build.
recipe_hash() {
    local text=
    while (($#)) && [[ $1 != -- ]]; do
        text+=$(declare -f "$1")
        shift
    done
    text+=$*
    text=$(sha256sum <<<"$text")
    printf '%s\n' "${text:0:12}"
}

# cache_make PATH WHAT BUILDER ARG...   makes PATH unless it is there: runs
#   `BUILDER ARG... TEMP`, which must leave a file or directory at TEMP, and
#   renames that to PATH. WHAT is for the message.
cache_make() {
    local path=$1 what=$2 dir lock temp
    shift 2
    [[ ! -e $path ]] || return 0
    dir=${path%/*}
    mkdir -p "$dir"
    exec {lock}>"$path.lock"
    if ! flock --nonblock "$lock"; then
        say "$what: another process is making it, waiting"
        # In the background, so that Ctrl-C and TERM work while waiting.
        child_run flock --exclusive "$lock"
    fi
    if [[ ! -e $path ]]; then
        # Nobody else builds this now, so a temporary of an earlier try is dead.
        rm -rf --one-file-system "$path".tmp.*
        temp=$path.tmp.$$
        on_exit rm -rf --one-file-system "$temp"
        step "$what" "$@" "$temp"
        sync --file-system "$dir"
        mv --no-target-directory "$temp" "$path"
    fi
    exec {lock}>&-
}

# work_dir VAR NAME          a fresh directory of this run under CACHE_DIR, its
#   path in VAR; deleted at the end unless KEEP is not empty. What a killed script
#   left behind is deleted by the next one: a directory belongs to whoever holds
#   the lock on its file `.in-use`.
work_dir() {
    local -n work_dir_path=$1
    local runs=$CACHE_DIR/runs lock old in_use
    mkdir -p "$runs"
    exec {lock}>"$runs/.lock"
    child_run flock --exclusive "$lock"
    for old in "$runs"/*/.in-use; do
        [[ ! -e $old ]] || ! flock --nonblock "$old" true || rm -rf --one-file-system "${old%/*}"
    done
    work_dir_path=$(mktemp -d "$runs/$2.XXXXXX")
    exec {in_use}>"$work_dir_path/.in-use" # open, and locked, until the script ends
    flock --exclusive "$in_use"
    exec {lock}>&-
    on_exit work_dir_delete "$work_dir_path"
}

work_dir_delete() {
    if [[ -n ${KEEP:-} ]]; then
        rm -f "$1/.in-use"
        say "kept: $1"
    else
        rm -rf --one-file-system "$1"
    fi
}

# ---- root ------------------------------------------------------------------

# as_root COMMAND ARG...     runs COMMAND, through sudo when not root
as_root() {
    if ((EUID == 0)); then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "needs root for: $* (run as root, or install sudo)"
    fi
}

# need_root SCRIPT ARG...    goes on as root: when not root, starts SCRIPT again
#   with ARG... through sudo, with the same cache directory and PATH, and does
#   not return.
need_root() {
    ((EUID != 0)) || return 0
    command -v sudo >/dev/null ||
        die "needs root (network namespaces, mounts, NFS server): run as root, or install sudo"
    say "needs root for network namespaces, mounts and the NFS server: going on with sudo"
    mkdir -p "$CACHE_DIR"
    trap - EXIT
    local name settings=("PATH=$PATH" "HOME=${HOME:-/root}" "VMCACHE_CACHE_DIR=$CACHE_DIR")
    for name in CARGO_TARGET_DIR LAB_BOOT_LIMIT VMCACHE_LIBRARY VMCACHE_LOG VMCACHE_DEBIAN_MIRROR \
        http_proxy https_proxy; do
        [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
    done
    exec sudo -- env "${settings[@]}" bash "$@"
}

[[ :$PATH: == *:/usr/sbin:* ]] || PATH=$PATH:/usr/sbin:/sbin
export PYTHONDONTWRITEBYTECODE=1 # nothing of root's in the checkout
