/*
 * generate.c - prints one entry of src/qemu/layout/tables.rs.
 *
 * scripts/gen-layouts compiles this against one release series' headers and
 * runs it. Nothing of QEMU is linked; only sizes, offsets and constants are
 * used. Two files the script extracts from the same tree are included:
 *
 *  vmcache-drivers.inc  the reference drivers, as their sources initialise them:
 *      DRIVER(format_name, symbol)      opens a driver; symbol is "" if static
 *      FLAG(field, value)               a bool
 *      SLOT(field, function)            a pointer; function is the exported
 *                                       function it must hold, "" if static
 *      END
 *  vmcache-marks.inc    MARK(function, declared)
 *                                       whether the series' headers declare it
 *
 * The output is Rust; the script passes it through rustfmt.
 */
#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/iov.h"
#include "qemu/module.h"
#include "vmcache.h"
#include "vmcache-layout.h"

#define FIELD(name) printf("        " #name ": %#x,\n", (unsigned)l->name)

static void print_layout(const struct vmcache_layout *l)
{
    printf("    layout: vmcache_layout {\n");
    printf("        size: size_of::<vmcache_layout>() as u32,\n");
    printf("        series: c\"%s\".as_ptr(),\n", l->series);
    FIELD(drv_sizeof);
    FIELD(drv_format_name);
    FIELD(drv_instance_size);
    FIELD(drv_is_filter);
    FIELD(drv_is_format);
    FIELD(drv_supports_backing);
    FIELD(drv_strong_runtime_opts);
    FIELD(drv_bdrv_open);
    FIELD(drv_bdrv_close);
    FIELD(drv_bdrv_reopen_prepare);
    FIELD(drv_bdrv_refresh_limits);
    FIELD(drv_bdrv_child_perm);
    FIELD(drv_bdrv_co_preadv_part);
    FIELD(drv_bdrv_co_block_status);
    FIELD(drv_getlength);
    FIELD(drv_get_info);
    FIELD(drv_list);
    FIELD(block_status_has_mode);
    FIELD(bs_sizeof);
    FIELD(bs_open_flags);
    FIELD(bs_drv);
    FIELD(bs_opaque);
    FIELD(bs_filename);
    FIELD(bs_filename_size);
    FIELD(bs_backing_file);
    FIELD(bs_backing_file_size);
    FIELD(bs_auto_backing_file);
    FIELD(bs_auto_backing_file_size);
    FIELD(bs_backing_format);
    FIELD(bs_backing_format_size);
    FIELD(bs_exact_filename);
    FIELD(bs_exact_filename_size);
    FIELD(bs_node_name);
    FIELD(bs_node_name_size);
    FIELD(bs_refcnt);
    FIELD(bs_backing);
    FIELD(bs_file);
    FIELD(bs_total_sectors);
    FIELD(bl_request_alignment);
    FIELD(bl_request_alignment_size);
    FIELD(bl_opt_transfer);
    FIELD(bl_opt_transfer_size);
    FIELD(bl_max_transfer);
    FIELD(bl_max_transfer_size);
    FIELD(child_bs);
    FIELD(reopen_bs);
    FIELD(reopen_flags);
    FIELD(qiov_sizeof);
    FIELD(qiov_iov);
    FIELD(qiov_niov);
    FIELD(qiov_size);
    FIELD(bdi_sizeof);
    FIELD(bdi_cluster_size);
    FIELD(o_rdwr);
    FIELD(o_nocache);
    FIELD(o_no_backing);
    FIELD(o_inactive);
    FIELD(o_check);
    FIELD(o_no_io);
    FIELD(o_auto_rdonly);
    FIELD(o_internal);
    FIELD(block_data);
    FIELD(block_zero);
    FIELD(block_offset_valid);
    FIELD(module_init_block);
    printf("        driver: std::ptr::null_mut(),\n");
    FIELD(reopen_options);
    printf("    },\n");
}

/*
 * Members that point at data; every other pointer in BlockDriver is a callback,
 * and callbacks are the ones named bdrv_*.
 */
static bool is_callback(const char *field)
{
    return strncmp(field, "bdrv_", 5) == 0;
}

static void print_slot(const char *field, unsigned offset,
                       const char *function)
{
    if (*function) {
        printf("            function(%#x, \"%s\", c\"%s\"),\n", offset, field,
               function);
    } else {
        printf("            %s(%#x, \"%s\"),\n",
               is_callback(field) ? "code" : "data", offset, field);
    }
}

static void print_drivers(void)
{
#define DRIVER(name, sym)                                                     \
    printf("    Reference {\n        format_name: c\"%s\",\n", name);         \
    if (*sym) {                                                               \
        printf("        symbol: Some(c\"%s\"),\n", sym);                      \
    } else {                                                                  \
        printf("        symbol: None,\n");                                    \
    }
#define FLAGS printf("        flags: &[\n");
#define FLAG(member, value)                                                   \
    printf("            flag(%#x, \"%s\", %s),\n",                            \
           (unsigned)offsetof(BlockDriver, member), #member,                  \
           (value) ? "true" : "false");
#define SLOTS printf("        ],\n        slots: &[\n");
#define SLOT(member, function)                                                \
    print_slot(#member, offsetof(BlockDriver, member), function);
#define END printf("        ],\n    },\n");
#include "vmcache-drivers.inc"
}

static void print_marks(void)
{
#define MARK(function, declared)                                              \
    printf("        mark(c\"%s\", %s),\n", function,                          \
           (declared) ? "true" : "false");
#include "vmcache-marks.inc"
}

int main(void)
{
    struct vmcache_layout layout;

    vmcache_layout_fill(&layout);
    printf("Table {\n");
    print_layout(&layout);
    printf("    marks: &[\n");
    print_marks();
    printf("    ],\n    references: &[\n");
    print_drivers();
    printf("    ],\n},\n");
    return 0;
}
