# shellcheck shell=bash
# boot.sh - boots the base image's guest once, in any QEMU, and times it.
#
# Used by: lab.sh, boot-node, record-boot, and test for boots of other kinds (full disk, quota, ...).
# Promises: when boot_guest returns, QEMU has ended. Success means that the guest
# reached multi-user and powered off by itself. The machine is the same each
# time; only the disk differs.
# Needs: python3.

# shellcheck source=scripts/lib/image.sh
source "$(dirname "${BASH_SOURCE[0]}")/image.sh"

# Emulated, since /dev/kvm is not to be had on every machine that runs this (and
# where it is there, it need not work), with one CPU and no network card.
# shellcheck disable=SC2054  # the commas are QEMU's
readonly BOOT_MACHINE=(
    -nodefaults -no-user-config -no-reboot
    -accel tcg -smp 1 -m 1024
    -display none -serial stdio
    -smbios "type=1,serial=$IMAGE_POWEROFF_SERIAL"
    -device virtio-rng-pci
    -device virtio-blk-pci,drive=disk0
)

# What qemu_trace.py reads.
readonly BOOT_TRACE_EVENTS=trace:bdrv_open_common,trace:bdrv_co_preadv_part

# boot_guest DIRECTORY LIMIT ARRAY DRIVE   boots with `-drive DRIVE`, which must
#   say if=none,id=disk0; empty where the words in front bring one. ARRAY names an
#   array: the words that start qemu-system-x86_64, with what comes before
#   (netns_prefix, chroot_prefix, `vmcache exec`, `vmcache boot`,
#   `env LD_PRELOAD=...`). LIMIT: seconds it may take to come up.
#   Leaves in DIRECTORY: boot.json (see boot.py), serial.log, stderr.log,
#   trace.log. Returns 1, and says why, when the guest did not come up.
boot_guest() {
    local directory=$1 limit=$2
    local -n boot_guest_qemu=$3
    local drive=$4
    mkdir -p "$directory"
    child_run python3 "$LIB_DIR/boot.py" \
        --log "$directory/serial.log" --stderr "$directory/stderr.log" \
        --result "$directory/boot.json" --marker "$IMAGE_MARKER" --limit "$limit" -- \
        "${boot_guest_qemu[@]}" "${BOOT_MACHINE[@]}" ${drive:+-drive "$drive"} \
        -d "$BOOT_TRACE_EVENTS" -D "$directory/trace.log" && return 0
    boot_explain "$directory"
    return 1
}

boot_explain() {
    local directory=$1
    say "$(json_get "$directory/boot.json" reason 2>/dev/null || echo 'the boot was interrupted')"
    if [[ -s $directory/stderr.log ]]; then
        say "QEMU said:"
        tail -n 10 "$directory/stderr.log" >&2
    fi
    if [[ -s $directory/serial.log ]]; then
        say "the end of the guest's console:"
        # Without the bytes that would move the cursor of this terminal.
        tail -n 15 "$directory/serial.log" | tr -cd '\n\t\40-\176' >&2
        echo >&2
    fi
}

# json_get FILE KEY...       prints the value under a path of keys
json_get() {
    python3 -c '
import json, sys
value = json.load(open(sys.argv[1], encoding="utf-8"))
for key in sys.argv[2:]:
    value = value[int(key)] if isinstance(value, list) else value[key]
print(value if isinstance(value, str) else json.dumps(value))' "$@"
}
