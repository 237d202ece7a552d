//! What a program that is not QEMU gets, and the driver as QEMU will see it.

use std::ffi::CStr;

use super::*;

fn byte_at(words: &[usize], offset: u32) -> u8 {
    words[offset as usize / 8].to_ne_bytes()[offset as usize % 8]
}

/// A layout of nothing but zeroes, but for the fields of the driver.
fn layout() -> Layout {
    // SAFETY: it is made of integers and a pointer, for which all zero bits are a value.
    let mut layout: Layout = unsafe { std::mem::zeroed() };
    layout.drv_sizeof = 0x80;
    layout.drv_instance_size = 0x8;
    layout.drv_is_format = 0xe;
    layout.drv_supports_backing = 0x10;
    layout.drv_bdrv_open = 0x18;
    layout.drv_bdrv_close = 0x20;
    layout.drv_bdrv_reopen_prepare = 0x28;
    layout.drv_bdrv_refresh_limits = 0x30;
    layout.drv_bdrv_child_perm = 0x38;
    layout.drv_bdrv_co_preadv_part = 0x40;
    layout.drv_bdrv_co_block_status = 0x48;
    layout.drv_getlength = 0x50;
    layout.drv_get_info = 0x58;
    layout.drv_list = 0x60;
    layout
}

#[test]
fn the_driver_has_everything_in_its_place() {
    let layout = layout();

    let words =
        driver_words(&layout, &driver::CALLBACKS, 0x1234, 0x5678, vec![0; 16]).expect("it fits");

    assert_eq!(words.len(), 16);
    assert_eq!(words[0], 0x1234);
    assert_eq!(words[1] as u32 as i32, driver::CALLBACKS.instance_size);
    assert_eq!(byte_at(&words, layout.drv_is_format), 1);
    assert_eq!(byte_at(&words, layout.drv_supports_backing), 1);
    assert_eq!(words[3], driver::CALLBACKS.open as *const () as usize);
    assert_eq!(words[7], 0x5678);
    assert_eq!(words[11], driver::CALLBACKS.get_info as *const () as usize);
    assert_eq!(words[12..], [0; 4]);
}

#[test]
fn a_driver_with_two_things_in_one_place_is_not_made() {
    let layout = Layout { drv_bdrv_close: 0x18, ..layout() };

    assert!(driver_words(&layout, &driver::CALLBACKS, 1, 2, vec![0; 16]).is_none());
}

#[test]
fn a_driver_with_something_outside_it_is_not_made() {
    let layout = Layout { drv_get_info: 0x80, ..layout() };

    assert!(driver_words(&layout, &driver::CALLBACKS, 1, 2, vec![0; 16]).is_none());
}

#[test]
fn a_callback_at_an_odd_place_is_not_made() {
    let layout = Layout { drv_get_info: 0x5c, ..layout() };

    assert!(driver_words(&layout, &driver::CALLBACKS, 1, 2, vec![0; 16]).is_none());
}

#[test]
fn what_a_given_driver_has_stays_in_its_place() {
    let mut given = [0usize; 16];
    given[0] = c"vmcache".as_ptr().addr();
    given[14] = 0xabcd;
    let layout = Layout { driver: given.as_mut_ptr().cast(), ..layout() };

    // SAFETY: as long as the layout says.
    let mut words = unsafe { given_words(&layout) };
    let name = take_name(&layout, &mut words).ok().expect("it is the right name");
    let words = driver_words(&layout, &driver::CALLBACKS, name, 2, words).expect("it fits");

    assert_eq!((words[0], words[14]), (given[0], 0xabcd));
    assert_eq!(words[3], driver::CALLBACKS.open as *const () as usize);
}

#[test]
fn a_given_driver_with_a_callback_of_ours_is_not_completed() {
    let mut given = vec![0; 16];
    given[3] = 0xabcd;

    assert!(driver_words(&layout(), &driver::CALLBACKS, 1, 2, given).is_none());
}

#[test]
fn a_given_driver_of_another_name_is_refused() {
    let mut given = vec![c"qcow2".as_ptr().addr(), 0];

    let refusal = take_name(&layout(), &mut given).expect_err("another name");

    assert_eq!(refusal.errno, libc::EINVAL);
}

#[test]
fn a_program_that_is_not_qemu_is_refused_once_and_for_all() {
    // SAFETY: NULL is allowed.
    let first = unsafe { vmcache_register(std::ptr::null()) };
    // SAFETY: NULL is allowed.
    let second = unsafe { vmcache_register(std::ptr::null()) };

    assert_eq!((first, second), (-libc::EINVAL, -libc::ENOTSUP));
}

#[test]
fn the_version_is_the_packages() {
    // SAFETY: the function returns a static string.
    let version = unsafe { CStr::from_ptr(vmcache_version()) };

    assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")));
}
