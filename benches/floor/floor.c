/*
 * floor.c - the least that a block driver for cached data can do: a QEMU block
 * driver, preloaded as vmcache is, that opens a raw file and answers a read with
 * one preadv2(RWF_NOWAIT) in the request's own coroutine, and does nothing else.
 *
 * Used by: scripts/bench, which measures vmcache against it. scripts/lib/floor.sh
 * compiles it against the headers of the QEMU it runs in; nothing of QEMU is
 * linked. In a program that is not QEMU it does nothing.
 *
 * Open it with driver=floor,filename=PATH,offset=BYTES,size=BYTES: the disk is that
 * part of the file. What the page cache does not have is read by a blocking preadv
 * in the same place: no worker thread, so it is a floor for cached data alone.
 * Read-only; one extent; no checks of any kind.
 */
#include "qemu/osdep.h"
#include <dlfcn.h>
#include <sys/uio.h>
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/iov.h"
#include "qemu/module.h"
#include "qobject/qdict.h"

typedef struct {
    int fd;
    int64_t offset;
    int64_t length;
} Floor;

static int64_t floor_number(QDict *options, const char *name)
{
    const char *text = qdict_get_try_str(options, name);
    int64_t number = text ? strtoll(text, NULL, 10) : 0;

    qdict_del(options, name);
    return number;
}

static int floor_open(BlockDriverState *bs, QDict *options, int flags,
                      Error **errp)
{
    Floor *s = bs->opaque;
    const char *path = qdict_get_try_str(options, "filename");

    if (!path || (flags & BDRV_O_RDWR)) {
        error_setg(errp, "floor takes a filename, for reading only");
        return -EINVAL;
    }
    s->offset = floor_number(options, "offset");
    s->length = floor_number(options, "size");
    if (s->length <= 0) {
        error_setg(errp, "floor needs the size of the disk in bytes");
        return -EINVAL;
    }
    s->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0) {
        int ret = -errno;

        error_setg_errno(errp, -ret, "floor could not open '%s'", path);
        return ret;
    }
    qdict_del(options, "filename");
    return 0;
}

static void floor_close(BlockDriverState *bs)
{
    Floor *s = bs->opaque;

    close(s->fd);
}

static int64_t coroutine_fn floor_co_getlength(BlockDriverState *bs)
{
    Floor *s = bs->opaque;

    return s->length;
}

static int coroutine_fn floor_co_preadv(BlockDriverState *bs, int64_t offset,
                                        int64_t bytes, QEMUIOVector *qiov,
                                        BdrvRequestFlags flags)
{
    Floor *s = bs->opaque;
    ssize_t got = preadv2(s->fd, qiov->iov, qiov->niov, s->offset + offset,
                          RWF_NOWAIT);

    if (got == bytes) {
        return 0;
    }
    do {
        got = preadv(s->fd, qiov->iov, qiov->niov, s->offset + offset);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        return -errno;
    }
    /* The end of a file that is no whole number of sectors. */
    qemu_iovec_memset(qiov, got, 0, bytes - got);
    return 0;
}

static BlockDriver floor_driver = {
    .format_name = "floor",
    .protocol_name = "floor",
    .instance_size = sizeof(Floor),
    .bdrv_needs_filename = true,
    .bdrv_open = floor_open,
    .bdrv_close = floor_close,
    .bdrv_co_getlength = floor_co_getlength,
    .bdrv_co_preadv = floor_co_preadv,
};

static void floor_init(void)
{
    bdrv_register(&floor_driver);
}

static void __attribute__((constructor)) floor_start(void)
{
    void (*ask)(void (*)(void), module_init_type) =
        dlsym(RTLD_DEFAULT, "register_module_init");

    if (ask) {
        ask(floor_init, MODULE_INIT_BLOCK);
    }
}
