/*
 * vmcache-layout.h - fills struct vmcache_layout from QEMU's own headers.
 *
 * Included by the C file in QEMU's tree and by generate.c, which makes the
 * tables for unmodified QEMUs, so that both say the same thing in the same
 * words. Include it after "qemu/osdep.h", "block/block_int.h",
 * "qemu/module.h" and "vmcache.h".
 *
 * The library finds QEMU's functions by name, so nothing but this file holds
 * the types that it calls them with (src/qemu/symbols.rs) against QEMU's.
 *
 * It must compile with every supported series and, as far as one can know, with
 * the ones in between: where a member was renamed the series decides which name
 * is used, and a series where none fits is a compile error, never a guess.
 */
#ifndef VMCACHE_LAYOUT_H
#define VMCACHE_LAYOUT_H

#include <stddef.h>

#include "block/aio.h"
#include "block/block.h"
#include "qapi/error.h"
#include "qemu/coroutine.h"
#include "qemu/iov.h"
/* 10.0 moved it. */
#if __has_include("qobject/qdict.h")
#include "qobject/qdict.h"
#else
#include "qapi/qmp/qdict.h"
#endif

/* 8.0 moved these two callbacks into coroutines and renamed them. */
#if QEMU_VERSION_MAJOR >= 8
#define VMCACHE_DRV_GETLENGTH bdrv_co_getlength
#define VMCACHE_DRV_GET_INFO bdrv_co_get_info
#else
#define VMCACHE_DRV_GETLENGTH bdrv_getlength
#define VMCACHE_DRV_GET_INFO bdrv_get_info
#endif

#define VMCACHE_STRINGIFY_(x) #x
#define VMCACHE_STRINGIFY(x) VMCACHE_STRINGIFY_(x)
#define VMCACHE_SERIES                                                        \
    VMCACHE_STRINGIFY(QEMU_VERSION_MAJOR) "."                                 \
    VMCACHE_STRINGIFY(QEMU_VERSION_MINOR)

/* The type bdrv_co_block_status had before 10.1 made its bool a set of flags. */
typedef int vmcache_block_status_bool(BlockDriverState *, bool, int64_t,
                                      int64_t, int64_t *, int64_t *,
                                      BlockDriverState **);
typedef int vmcache_block_status_mode(BlockDriverState *, unsigned int,
                                      int64_t, int64_t, int64_t *, int64_t *,
                                      BlockDriverState **);

#define VMCACHE_BLOCK_STATUS_IS(type)                                         \
    __builtin_types_compatible_p(                                             \
        __typeof__(((BlockDriver *)0)->bdrv_co_block_status), type *)

/* What the driver takes for granted about integers it reads and writes. */
#define VMCACHE_ASSERT_MEMBER(type, member, bytes)                            \
    _Static_assert(sizeof(((type *)0)->member) == (bytes),                    \
                   #type "." #member " is not " #bytes " bytes wide")
VMCACHE_ASSERT_MEMBER(BlockDriver, instance_size, 4);
VMCACHE_ASSERT_MEMBER(BlockDriver, is_filter, 1);
VMCACHE_ASSERT_MEMBER(BlockDriver, is_format, 1);
VMCACHE_ASSERT_MEMBER(BlockDriver, supports_backing, 1);
VMCACHE_ASSERT_MEMBER(BlockDriverState, open_flags, 4);
VMCACHE_ASSERT_MEMBER(BlockDriverState, refcnt, 4);
VMCACHE_ASSERT_MEMBER(BlockDriverState, total_sectors, 8);
VMCACHE_ASSERT_MEMBER(BDRVReopenState, flags, 4);
VMCACHE_ASSERT_MEMBER(QEMUIOVector, niov, 4);
VMCACHE_ASSERT_MEMBER(QEMUIOVector, size, 8);
VMCACHE_ASSERT_MEMBER(BlockDriverInfo, cluster_size, 4);
_Static_assert(VMCACHE_BLOCK_STATUS_IS(vmcache_block_status_bool) ||
               VMCACHE_BLOCK_STATUS_IS(vmcache_block_status_mode),
               "bdrv_co_block_status has a type vmcache does not know");

#define VMCACHE_ASSERT_FUNCTION(result, name, ...)                            \
    _Static_assert(__builtin_types_compatible_p(__typeof__(name),             \
                                                result(__VA_ARGS__)),         \
                   #name " has a type vmcache does not know")
VMCACHE_ASSERT_FUNCTION(void, bdrv_register, BlockDriver *);
VMCACHE_ASSERT_FUNCTION(BlockDriver *, bdrv_find_format, const char *);
VMCACHE_ASSERT_FUNCTION(int, bdrv_open_file_child, const char *, QDict *,
                        const char *, BlockDriverState *, Error **);
VMCACHE_ASSERT_FUNCTION(int, bdrv_open_backing_file, BlockDriverState *,
                        QDict *, const char *, Error **);
VMCACHE_ASSERT_FUNCTION(void, bdrv_default_perms, BlockDriverState *,
                        BdrvChild *, BdrvChildRole, BlockReopenQueue *,
                        uint64_t, uint64_t, uint64_t *, uint64_t *);
VMCACHE_ASSERT_FUNCTION(BdrvChild *, bdrv_primary_child, BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(BdrvChild *, bdrv_cow_child, BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(int, bdrv_co_preadv, BdrvChild *, int64_t, int64_t,
                        QEMUIOVector *, BdrvRequestFlags);
VMCACHE_ASSERT_FUNCTION(int, bdrv_pread, BdrvChild *, int64_t, int64_t,
                        void *, BdrvRequestFlags);
VMCACHE_ASSERT_FUNCTION(int64_t, bdrv_getlength, BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(int64_t, bdrv_nb_sectors, BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(void, bdrv_refresh_filename, BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(const char *, bdrv_get_node_name,
                        const BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(BlockDriverState *, bdrv_find_node, const char *);
VMCACHE_ASSERT_FUNCTION(int, bdrv_apply_auto_read_only, BlockDriverState *,
                        const char *, Error **);
VMCACHE_ASSERT_FUNCTION(void, bdrv_get_backing_filename, BlockDriverState *,
                        char *, int);
VMCACHE_ASSERT_FUNCTION(AioContext *, bdrv_get_aio_context,
                        BlockDriverState *);
VMCACHE_ASSERT_FUNCTION(void, aio_co_wake, Coroutine *);
VMCACHE_ASSERT_FUNCTION(Coroutine *, qemu_coroutine_self, void);
VMCACHE_ASSERT_FUNCTION(void, qemu_coroutine_yield, void);
VMCACHE_ASSERT_FUNCTION(void, error_setg_internal, Error **, const char *, int,
                        const char *, const char *, ...);
VMCACHE_ASSERT_FUNCTION(const char *, qdict_get_try_str, const QDict *,
                        const char *);
VMCACHE_ASSERT_FUNCTION(bool, qdict_get_try_bool, const QDict *, const char *,
                        bool);
VMCACHE_ASSERT_FUNCTION(int, qdict_haskey, const QDict *, const char *);
VMCACHE_ASSERT_FUNCTION(void, qdict_del, QDict *, const char *);
VMCACHE_ASSERT_FUNCTION(void, qemu_iovec_init_external, QEMUIOVector *,
                        struct iovec *, int);

static inline void vmcache_layout_fill(struct vmcache_layout *l)
{
    *l = (struct vmcache_layout) {
        .size = sizeof(*l),
        .series = VMCACHE_SERIES,

        .drv_sizeof = sizeof(BlockDriver),
        .drv_format_name = offsetof(BlockDriver, format_name),
        .drv_instance_size = offsetof(BlockDriver, instance_size),
        .drv_is_filter = offsetof(BlockDriver, is_filter),
        .drv_is_format = offsetof(BlockDriver, is_format),
        .drv_supports_backing = offsetof(BlockDriver, supports_backing),
        .drv_strong_runtime_opts = offsetof(BlockDriver, strong_runtime_opts),
        .drv_bdrv_open = offsetof(BlockDriver, bdrv_open),
        .drv_bdrv_close = offsetof(BlockDriver, bdrv_close),
        .drv_bdrv_reopen_prepare = offsetof(BlockDriver, bdrv_reopen_prepare),
        .drv_bdrv_refresh_limits = offsetof(BlockDriver, bdrv_refresh_limits),
        .drv_bdrv_child_perm = offsetof(BlockDriver, bdrv_child_perm),
        .drv_bdrv_co_preadv_part = offsetof(BlockDriver, bdrv_co_preadv_part),
        .drv_bdrv_co_block_status =
            offsetof(BlockDriver, bdrv_co_block_status),
        .drv_getlength = offsetof(BlockDriver, VMCACHE_DRV_GETLENGTH),
        .drv_get_info = offsetof(BlockDriver, VMCACHE_DRV_GET_INFO),
        .drv_list = offsetof(BlockDriver, list),
        .block_status_has_mode =
            VMCACHE_BLOCK_STATUS_IS(vmcache_block_status_mode),

        .bs_sizeof = sizeof(BlockDriverState),
        .bs_open_flags = offsetof(BlockDriverState, open_flags),
        .bs_drv = offsetof(BlockDriverState, drv),
        .bs_opaque = offsetof(BlockDriverState, opaque),
        .bs_filename = offsetof(BlockDriverState, filename),
        .bs_filename_size = sizeof(((BlockDriverState *)0)->filename),
        .bs_backing_file = offsetof(BlockDriverState, backing_file),
        .bs_backing_file_size = sizeof(((BlockDriverState *)0)->backing_file),
        .bs_auto_backing_file = offsetof(BlockDriverState, auto_backing_file),
        .bs_auto_backing_file_size =
            sizeof(((BlockDriverState *)0)->auto_backing_file),
        .bs_backing_format = offsetof(BlockDriverState, backing_format),
        .bs_backing_format_size =
            sizeof(((BlockDriverState *)0)->backing_format),
        .bs_exact_filename = offsetof(BlockDriverState, exact_filename),
        .bs_exact_filename_size =
            sizeof(((BlockDriverState *)0)->exact_filename),
        .bs_node_name = offsetof(BlockDriverState, node_name),
        .bs_node_name_size = sizeof(((BlockDriverState *)0)->node_name),
        .bs_refcnt = offsetof(BlockDriverState, refcnt),
        .bs_backing = offsetof(BlockDriverState, backing),
        .bs_file = offsetof(BlockDriverState, file),
        .bs_total_sectors = offsetof(BlockDriverState, total_sectors),

        .bl_request_alignment =
            offsetof(BlockDriverState, bl.request_alignment),
        .bl_request_alignment_size =
            sizeof(((BlockLimits *)0)->request_alignment),
        .bl_opt_transfer = offsetof(BlockDriverState, bl.opt_transfer),
        .bl_opt_transfer_size = sizeof(((BlockLimits *)0)->opt_transfer),
        .bl_max_transfer = offsetof(BlockDriverState, bl.max_transfer),
        .bl_max_transfer_size = sizeof(((BlockLimits *)0)->max_transfer),

        .child_bs = offsetof(BdrvChild, bs),

        .reopen_bs = offsetof(BDRVReopenState, bs),
        .reopen_flags = offsetof(BDRVReopenState, flags),

        .qiov_sizeof = sizeof(QEMUIOVector),
        .qiov_iov = offsetof(QEMUIOVector, iov),
        .qiov_niov = offsetof(QEMUIOVector, niov),
        .qiov_size = offsetof(QEMUIOVector, size),

        .bdi_sizeof = sizeof(BlockDriverInfo),
        .bdi_cluster_size = offsetof(BlockDriverInfo, cluster_size),

        .o_rdwr = BDRV_O_RDWR,
        .o_nocache = BDRV_O_NOCACHE,
        .o_no_backing = BDRV_O_NO_BACKING,
        .o_inactive = BDRV_O_INACTIVE,
        .o_check = BDRV_O_CHECK,
        .o_no_io = BDRV_O_NO_IO,
        .o_auto_rdonly = BDRV_O_AUTO_RDONLY,
        .o_internal = BDRV_O_SNAPSHOT | BDRV_O_NO_BACKING | BDRV_O_PROTOCOL,

        .block_data = BDRV_BLOCK_DATA,
        .block_zero = BDRV_BLOCK_ZERO,
        .block_offset_valid = BDRV_BLOCK_OFFSET_VALID,

        .module_init_block = MODULE_INIT_BLOCK,

        .driver = NULL,

        .reopen_options = offsetof(BDRVReopenState, options),
    };
}

#endif /* VMCACHE_LAYOUT_H */
