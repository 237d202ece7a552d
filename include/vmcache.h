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

/* The library's version, as in "0.1.0". Static storage, never NULL. */
const char *vmcache_version(void);

#ifdef __cplusplus
}
#endif

#endif /* VMCACHE_H */
