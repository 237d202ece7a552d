# shellcheck shell=bash
# nfs.sh - a real NFS server (nfs-ganesha, in user space) that exports
# directories read-only: where the base image comes from.
#
# Used by: lab.sh, and test.
# Promises: after nfs_start the server has answered a read of a file. It runs
# with its rpcbind in process and mount namespaces of its own, with a private
# /run and /var/lib/nfs: one process id stands for all of it, stopping that
# stops everything, nothing is left in the file system, and servers in different
# network namespaces do not meet. One server per network namespace. In the
# namespace `host`, rpcbind listens on all addresses while the server runs (its
# option to bind to one crashes in Debian 12's 1.2.6); nfs-ganesha on its own.
# Needs: root; package groups nfs, qemu, net.

# shellcheck source=scripts/lib/netns.sh
source "$(dirname "${BASH_SOURCE[0]}")/netns.sh"

# nfs_start VAR NS ADDRESS DIRECTORY...   exports each DIRECTORY, of which the
#   first must hold a file, at ADDRESS in network namespace NS (`host`: the
#   machine's own); the server's handle in VAR. A file in one is
#   nfs://ADDRESS/DIRECTORY/FILE.
nfs_start() {
    local -n nfs_start_handle=$1
    local ns=$2 address=$3 directory=$4
    local handle='' state='' prefix probe='' file rpcbind=own i
    ((EUID == 0)) || die "the NFS server needs root"
    for file in "$directory"/*; do
        [[ -f $file && -r $file ]] || continue
        probe=$file
        break
    done
    [[ $directory == /* && -n $probe ]] || die "nfs_start: $directory is not a directory with a file in it"

    work_dir state nfs-server
    nfs_config "$ns" "$address" "${@:4}" >"$state/ganesha.conf"

    if netns_exec "$ns" ss -Hltn 'sport = :2049' | grep --quiet .; then
        die "port 2049 is in use in this network namespace: another NFS server runs"
    fi
    # The machine may run an rpcbind already; it serves as well.
    if netns_exec "$ns" ss -Hltn 'sport = :111' | grep --quiet .; then rpcbind=theirs; fi

    netns_prefix prefix "$ns"
    # shellcheck disable=SC2016  # expands inside
    child_start handle "${prefix[@]}" \
        "${BOX[@]}" \
        bash -euc '
            state=$1 rpcbind=$2
            mkdir -p /var/lib/nfs
            mount -t tmpfs tmpfs /var/lib/nfs
            mkdir -p /var/lib/nfs/ganesha
            if [ "$rpcbind" = own ]; then
                mount -t tmpfs tmpfs /run
                mkdir -p /run/rpcbind
                rpcbind
            fi
            mkdir -p /run/ganesha
            exec ganesha.nfsd -F -f "$state/ganesha.conf" -L "$state/ganesha.log" -p "$state/ganesha.pid"
        ' nfs-server "$state" "$rpcbind" >"$state/stderr" 2>&1 </dev/null

    for ((i = 0; i < 300; i++)); do
        if timeout --signal KILL 5 "${prefix[@]}" \
            qemu-img info -f raw "nfs://$address$probe" >/dev/null 2>"$state/probe"; then
            # shellcheck disable=SC2034  # the caller's variable
            nfs_start_handle=$handle
            return 0
        fi
        kill -0 "$handle" 2>/dev/null || break
        sleep 0.1
    done
    # What matters of the log; its D-Bus and Kerberos complaints are harmless.
    {
        grep --extended-regexp ':(CRIT|MAJ|FATAL) ' "$state/ganesha.log" |
            grep --invert-match --extended-regexp 'dbus|DBUS|gssd_|krb5' | head -n 8
        tail -n 8 "$state/stderr" "$state/probe"
    } >&2 || true
    netns_exec "$ns" ss -Hltn 'sport = :111' | grep --quiet . || say "rpcbind does not run"
    die "the NFS server on $address did not come up (the lines above are from its logs)"
}

# nfs_stop HANDLE            stops server and rpcbind
nfs_stop() { child_stop "$1"; }

# nfs_config NS ADDRESS DIRECTORY...
nfs_config() {
    local directory number=0
    # In a namespace with nothing but lo, ganesha's look-up of 127.0.0.1 fails;
    # there, listening on all addresses does no harm either.
    local bind=
    [[ $1 != host ]] || bind="Bind_addr = $2;"
    cat <<CONF
NFS_CORE_PARAM {
    Protocols = 3, 4;
    NFS_Port = 2049;
    MNT_Port = 20048;
    Enable_NLM = false;
    Enable_RQUOTA = false;
    $bind
}
NFSV4 { Graceless = true; }
NFS_KRB5 { Active_krb5 = false; }
LOG { Default_Log_Level = EVENT; }
CONF
    for directory in "${@:3}"; do
        number=$((number + 1))
        cat <<CONF
EXPORT {
    Export_Id = $number;
    Path = "$directory";
    Pseudo = "$directory";
    Access_Type = RO;
    Squash = No_Root_Squash;
    SecType = sys;
    Protocols = 3, 4;
    Transports = TCP;
    FSAL { Name = VFS; }
}
CONF
    done
}
