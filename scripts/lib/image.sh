# shellcheck shell=bash
# image.sh - a real Debian 12 as a 4 GiB raw disk image: the base of every boot.
#
# Used by: demo, bench-boot, test, through image_base.
# Promises: the image has a partition table, an ext4 root named by UUID,
# extlinux, Debian's cloud kernel, systemd and sshd, and its console on ttyS0.
# It is made once per version of this recipe and then only read. It boots to
# multi-user.target; there, when the machine's SMBIOS serial number is
# IMAGE_POWEROFF_SERIAL, it prints IMAGE_MARKER and the seconds of its uptime on
# ttyS0 and powers off. The flag stands outside the image, so nothing has to be
# changed in it, and reading it costs no block.
# Needs: root, a loop device, the Debian archive (or VMCACHE_DEBIAN_MIRROR).

# shellcheck source=scripts/lib/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly IMAGE_MARKER=VMCACHE-BOOT-OK
readonly IMAGE_POWEROFF_SERIAL=vmcache-boot-and-power-off

readonly IMAGE_SIZE=$((4 << 30))
readonly IMAGE_ROOT_OFFSET=$((1 << 20))
readonly IMAGE_ROOT_UUID=5f0c4d7e-3b1a-4c55-9d2e-7a6d63616368

# image_base VAR             path of the image in VAR; makes it when it is not there
image_base() {
    local -n image_base_path=$1
    local hash
    hash=$(recipe_hash image_build image_populate image_unit -- \
        "$IMAGE_MARKER" "$IMAGE_POWEROFF_SERIAL" "$IMAGE_SIZE" "$IMAGE_ROOT_OFFSET" "$IMAGE_ROOT_UUID")
    image_base_path=$CACHE_DIR/images/debian12-$hash.raw
    cache_make "$image_base_path" "making a Debian 12 image (once, 1 to 2 minutes)" image_build
}

# image_build FILE
#   Says `|| die` each time: a caller's own `||` would switch errexit off.
image_build() {
    local file=$1 functions
    ((EUID == 0)) || die "making the Debian image needs root"
    truncate --size "$IMAGE_SIZE" "$file" || die "could not make $file"
    echo "start=$((IMAGE_ROOT_OFFSET / 512)), type=83, bootable" |
        sfdisk --quiet --label dos "$file" || die "could not partition $file"
    dd if=/usr/lib/syslinux/mbr/mbr.bin of="$file" bs=440 count=1 conv=notrunc status=none ||
        die "could not write the boot sector of $file"
    # Every feature by name: extlinux reads no more than these, and the defaults
    # differ between releases. No lazy initialisation, or the guest's kernel
    # would write to the disk in the background.
    mkfs.ext4 -q -F -b 4096 -U "$IMAGE_ROOT_UUID" -L vmcache-root -m 1 \
        -O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
        -E "offset=$IMAGE_ROOT_OFFSET,lazy_itable_init=0,lazy_journal_init=0,hash_seed=$IMAGE_ROOT_UUID" \
        "$file" "$(((IMAGE_SIZE - IMAGE_ROOT_OFFSET) / 1024))k" || die "could not make a filesystem in $file"
    # In a mount namespace of its own, with the loop device released by the last
    # unmount: nothing is left behind, however this ends.
    functions=$(declare -f image_populate image_unit)
    on_exit rm -rf --one-file-system "$file.mnt" "$file.log" "$file.scratch"
    mkdir -p "$file.scratch" # mmdebstrap's, which a kill would leave in /tmp
    # shellcheck disable=SC2016  # expands inside
    child_run "${BOX[@]}" \
        env "VMCACHE_DEBIAN_MIRROR=${VMCACHE_DEBIAN_MIRROR:-}" "TMPDIR=$file.scratch" \
        bash -euo pipefail -c "$functions"'; image_populate "$@"' image_populate \
        "$file" "$file.mnt" "$IMAGE_ROOT_OFFSET" "$IMAGE_ROOT_UUID" "$IMAGE_MARKER" \
        "$IMAGE_POWEROFF_SERIAL" >"$file.log" 2>&1 </dev/null || {
        tail -n 20 "$file.log" >&2
        die "making the Debian image failed (the lines above are the end of its log)"
    }
    rm -rf --one-file-system "$file.mnt" "$file.log" "$file.scratch"
    fallocate --dig-holes "$file" || die "could not make $file sparse"
    chmod 444 "$file"
}

# image_populate FILE MOUNTPOINT OFFSET UUID MARKER SERIAL
#   runs in its own mount and process namespace
image_populate() {
    local file=$1 root=$2 offset=$3 uuid=$4 marker=$5 serial=$6
    local kernel mirror=()
    [[ -z ${VMCACHE_DEBIAN_MIRROR:-} ]] || mirror=("$VMCACHE_DEBIAN_MIRROR")
    mkdir -p "$root"
    mount -o "loop,offset=$offset" "$file" "$root"
    # Docs and translations are never read at boot and cost a third of the time.
    mmdebstrap --mode=root --variant=minbase \
        --include=linux-image-cloud-amd64,initramfs-tools,zstd,systemd-sysv,systemd-timesyncd,udev,dbus,kmod,e2fsprogs,iproute2,ifupdown,openssh-server,procps,login \
        --dpkgopt=force-unsafe-io \
        --dpkgopt=path-exclude=/usr/share/man/* \
        --dpkgopt=path-exclude=/usr/share/locale/* \
        --dpkgopt=path-exclude=/usr/share/doc/* \
        bookworm "$root" "${mirror[@]}"
    rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"

    printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$uuid" >"$root/etc/fstab"
    echo debian12 >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 debian12\n' >"$root/etc/hosts"
    # A fixed machine id, and nothing that runs at a time of its own choosing:
    # then each boot reads the same blocks.
    echo 76d6361636865000000000000000c0de >"$root/etc/machine-id"
    chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer e2scrub_all.timer fstrim.timer systemd-tmpfiles-clean.timer

    image_unit "$root" "$marker" "$serial"

    # On a loaded host an emulated timer can be late enough for the kernel to think
    # it does not work; and a kernel that panics ends the boot at once.
    kernel=$(cd "$root/boot" && echo vmlinuz-*)
    mkdir "$root/boot/extlinux"
    cat >"$root/boot/extlinux/extlinux.conf" <<CONF
SERIAL 0 115200
DEFAULT debian
PROMPT 0
TIMEOUT 0
LABEL debian
    LINUX /boot/$kernel
    INITRD /boot/initrd.img-${kernel#vmlinuz-}
    APPEND root=UUID=$uuid ro console=ttyS0,115200 loglevel=4 systemd.show_status=1 no_timer_check panic=-1
CONF
    extlinux --install "$root/boot/extlinux"

    fstrim "$root"
    sync --file-system "$root"
    umount "$root"
}

# image_unit ROOT MARKER SERIAL   the unit that says the guest is up
image_unit() {
    local root=$1 marker=$2 serial=$3
    cat >"$root/usr/local/sbin/vmcache-boot-ok" <<SCRIPT
#!/bin/sh
# Says on the serial console that the guest came up, and powers it off, when the
# machine's serial number asks for it.
read -r serial </sys/class/dmi/id/product_serial || exit 0
[ "\$serial" = "$serial" ] || exit 0
read -r uptime rest </proc/uptime
printf '\n$marker %s\n' "\$uptime" >/dev/ttyS0
exec systemctl --force poweroff
SCRIPT
    chmod 755 "$root/usr/local/sbin/vmcache-boot-ok"
    cat >"$root/etc/systemd/system/vmcache-boot-ok.service" <<'UNIT'
[Unit]
Description=Tell the serial console that the guest is up
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/vmcache-boot-ok

[Install]
WantedBy=multi-user.target
UNIT
    chroot "$root" systemctl --quiet enable vmcache-boot-ok.service
}
