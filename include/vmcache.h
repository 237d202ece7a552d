/*
 * vmcache.h - the whole contract between QEMU's C and vmcache's Rust.
 *
 * vmcache is a QEMU block driver in a shared library, libvmcache.so. It is
 * built without QEMU's headers, so everything it has to know about QEMU's
 * structures comes to it in one `struct vmcache_layout`:
 *
 *  - in a QEMU whose tree holds the driver's small C file, that file fills the
 *    structure with the compiler's own offsetof() (see vmcache-layout.h beside
 *    the tables in src/qemu/layout/) and passes it to vmcache_register();
 *  - for an unmodified QEMU the library carries one filled structure per
 *    supported release series, made from that series' headers by the same C
 *    code, and uses one only after it has been held against the running program.
 *
 * Every offset is in bytes from the start of the named QEMU structure, every
 * size in bytes. Functions return 0 or a negative errno value.
 *
 * The structure may grow at its end; `size` tells the library how much of it
 * the caller knows. Fields are never moved, removed or given a new meaning.
 */
#ifndef VMCACHE_H
#define VMCACHE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What vmcache needs to know about one QEMU release series. */
struct vmcache_layout {
    /* sizeof(struct vmcache_layout) as the caller was compiled. */
    uint32_t size;
    /* The release series, major and minor: "7.2", "10.0". Never NULL. */
    const char *series;

    /*
     * struct BlockDriver, block/block_int-common.h. "drv_" fields are offsets
     * of the members of the same name, except where noted.
     */
    uint32_t drv_sizeof;
    uint32_t drv_format_name;         /* const char * */
    uint32_t drv_instance_size;       /* int */
    uint32_t drv_is_filter;           /* bool */
    uint32_t drv_is_format;           /* bool */
    uint32_t drv_supports_backing;    /* bool */
    uint32_t drv_strong_runtime_opts; /* const char *const * */
    uint32_t drv_bdrv_open;
    uint32_t drv_bdrv_close;
    uint32_t drv_bdrv_reopen_prepare;
    uint32_t drv_bdrv_refresh_limits;
    uint32_t drv_bdrv_child_perm;
    uint32_t drv_bdrv_co_preadv_part;
    uint32_t drv_bdrv_co_block_status;
    uint32_t drv_getlength;           /* bdrv_getlength, bdrv_co_getlength since 8.0 */
    uint32_t drv_get_info;            /* bdrv_get_info, bdrv_co_get_info since 8.0 */
    uint32_t drv_list;                /* the QLIST_ENTRY: next, then address of previous */
    /*
     * The second argument of bdrv_co_block_status: 0 for `bool want_zero`,
     * 1 for `unsigned int mode` (since 10.1).
     */
    uint32_t block_status_has_mode;

    /* struct BlockDriverState, block/block_int-common.h. */
    uint32_t bs_sizeof;
    uint32_t bs_open_flags;           /* int */
    uint32_t bs_drv;                  /* BlockDriver * */
    uint32_t bs_opaque;               /* void * */
    uint32_t bs_filename;             /* char[] */
    uint32_t bs_filename_size;
    uint32_t bs_backing_file;         /* char[] */
    uint32_t bs_backing_file_size;
    uint32_t bs_auto_backing_file;    /* char[] */
    uint32_t bs_auto_backing_file_size;
    uint32_t bs_backing_format;       /* char[] */
    uint32_t bs_backing_format_size;
    uint32_t bs_exact_filename;       /* char[] */
    uint32_t bs_exact_filename_size;
    uint32_t bs_node_name;            /* char[] */
    uint32_t bs_node_name_size;
    uint32_t bs_refcnt;               /* int */
    uint32_t bs_backing;              /* BdrvChild * */
    uint32_t bs_file;                 /* BdrvChild * */
    uint32_t bs_total_sectors;        /* int64_t, in units of 512 bytes */

    /*
     * Members of BlockDriverState.bl (struct BlockLimits), as offsets from the
     * start of BlockDriverState; unsigned integers of the given size.
     */
    uint32_t bl_request_alignment;
    uint32_t bl_request_alignment_size;
    uint32_t bl_opt_transfer;
    uint32_t bl_opt_transfer_size;
    uint32_t bl_max_transfer;
    uint32_t bl_max_transfer_size;

    /* struct BdrvChild, block/block_int-common.h. */
    uint32_t child_bs;                /* BlockDriverState * */

    /* BDRVReopenState, block/block-common.h. */
    uint32_t reopen_bs;               /* BlockDriverState * */
    uint32_t reopen_flags;            /* int */

    /* QEMUIOVector, qemu/iov.h. */
    uint32_t qiov_sizeof;
    uint32_t qiov_iov;                /* struct iovec * */
    uint32_t qiov_niov;               /* int */
    uint32_t qiov_size;               /* size_t */

    /* BlockDriverInfo, block/block-common.h. */
    uint32_t bdi_sizeof;
    uint32_t bdi_cluster_size;        /* int */

    /* Open flags, block/block-common.h: the BDRV_O_ value of the same name. */
    uint32_t o_rdwr;
    uint32_t o_nocache;
    uint32_t o_no_backing;
    uint32_t o_inactive;
    uint32_t o_check;
    uint32_t o_no_io;
    uint32_t o_auto_rdonly;
    /*
     * Flags that block.c takes away before it calls bdrv_open, so that they
     * stand in BlockDriverState.open_flags only (bdrv_open_flags(), block.c).
     */
    uint32_t o_internal;

    /* What bdrv_co_block_status returns, block/block-common.h: BDRV_BLOCK_. */
    uint32_t block_data;
    uint32_t block_zero;
    uint32_t block_offset_valid;

    /* MODULE_INIT_BLOCK of module_init_type, qemu/module.h. */
    uint32_t module_init_block;

    /*
     * NULL, or a BlockDriver of the caller's that lives as long as the program:
     * it is completed and registered in place of one that the library makes.
     * What the caller has set in it stays; it may set format_name, to
     * "vmcache", and callbacks that have no field above.
     */
    void *driver;

    /* BDRVReopenState, block/block-common.h. */
    uint32_t reopen_options;          /* QDict * */
};

/*
 * Registers the block driver "vmcache" with the QEMU this is called in.
 *
 * For a C file in QEMU's tree, from its block_init() function; `layout` is
 * copied and need not outlive the call. Registering again, or after the library
 * has registered itself because it was preloaded, does nothing and returns 0.
 *
 *  -EINVAL   `layout` is NULL, or shorter than this library needs
 *  -ENOSYS   a QEMU function the driver needs is not exported
 *  -ENOTSUP  `layout` does not describe the program it was called in
 *  -EBUSY    another thread is registering the driver at this moment
 *  -EFAULT   the library failed in a way it did not foresee
 *
 * Every refusal also writes one line to standard error. QEMU goes on without
 * the driver.
 */
int vmcache_register(const struct vmcache_layout *layout);

/*
 * What one open node did since it was opened. In bytes, but for `reads`,
 * `base_reads`, `populate_errors` and `checkpoints`. May grow at its end.
 */
struct vmcache_node_stats {
    /* sizeof(struct vmcache_node_stats) as the caller was compiled. */
    uint32_t size;
    uint32_t reserved;
    uint64_t reads;                   /* read requests */
    uint64_t hit_bytes;               /* served from data in the cache */
    uint64_t zero_bytes;              /* served as zeros the cache knows of */
    uint64_t miss_bytes;              /* served from the base */
    uint64_t waited_bytes;            /* waited for another's fetch */
    uint64_t base_reads;              /* requests to the base */
    uint64_t base_bytes;              /* requested from the base */
    uint64_t populated_bytes;         /* stored, as data or as zeros */
    uint64_t dropped_bytes;           /* fetched but not stored */
    uint64_t populate_errors;         /* attempts to store that failed */
    uint64_t checkpoints;
    uint64_t bad_bytes;               /* did not fit their checksums */
    uint64_t repaired_bytes;          /* of those, stored anew */
};

/* What a cache image is good for now. */
enum vmcache_state {
    VMCACHE_STATE_EMPTY = 0,          /* nothing is cached yet */
    VMCACHE_STATE_FILLING = 1,        /* something is, and there is room */
    VMCACHE_STATE_FULL = 2,           /* the quota is reached */
    VMCACHE_STATE_STALE = 3,          /* the base is another */
    VMCACHE_STATE_DAMAGED = 4,        /* the image contradicts itself */
};

/* The cache image that a node has open. May grow at its end. */
struct vmcache_node_info {
    /* sizeof(struct vmcache_node_info) as the caller was compiled. */
    uint32_t size;
    uint32_t state;                   /* enum vmcache_state */
    uint64_t cluster_size;            /* bytes, as are the next five */
    uint64_t subcluster_size;
    uint64_t quota;                   /* 0 for none */
    uint64_t cached_bytes;            /* held as data */
    uint64_t zero_bytes;              /* known to be zero */
    uint64_t actual_size;             /* occupied by the file */
    uint32_t processes;               /* that can populate it now */
    uint32_t bypassed;                /* 1: this node reads the base alone */
    uint8_t uuid[16];
};

/*
 * Tell about a node of this driver: `opaque` is its BlockDriverState.opaque,
 * between the end of its bdrv_open and its bdrv_close. In QEMU's main thread.
 * The caller sets `size`; as many bytes are written as both sides know, `size`
 * excepted, and what the caller alone knows is left as it is.
 * vmcache_node_stats() does no input or output; vmcache_node_info() reads the
 * image's header and tables.
 *
 *  -EINVAL   a pointer is NULL, or `size` has no room for the first field
 *  -EFAULT   the library failed in a way it did not foresee
 *
 * vmcache_node_info() also fails with what kept it from reading the image.
 */
int vmcache_node_stats(const void *opaque, struct vmcache_node_stats *stats);
int vmcache_node_info(const void *opaque, struct vmcache_node_info *info);

/* The library's version, as in "0.1.0". Static storage, never NULL. */
const char *vmcache_version(void);

#ifdef __cplusplus
}
#endif

#endif /* VMCACHE_H */
