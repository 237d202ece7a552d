//! Conversions between C and Rust that the callbacks share: errors, options, strings, fields of
//! QEMU's structures.
//!
//! Used by `driver`, `node` and `io`.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;

use super::Api;
use super::symbols::{QDict, QemuError};
use crate::error::{Error, ErrorKind, Result};
use crate::size;

/// A field of one of QEMU's structures.
///
/// # Safety
/// `object` must be a live structure for which `offset` comes from the verified layout, and the
/// field there must be a `T`.
pub(super) unsafe fn field<T, U>(object: *mut T, offset: u32) -> *mut U {
    // SAFETY: within the object (caller).
    unsafe { object.cast::<u8>().add(offset as usize).cast::<U>() }
}

/// Hands an error to QEMU.
///
/// # Safety
/// `errp` must be what QEMU passed in: NULL or a place for an error that is still empty.
pub(super) unsafe fn set_error(api: &Api, errp: *mut *mut QemuError, err: &Error) -> c_int {
    let text = err.to_string().replace('\0', "?");
    if let Ok(text) = CString::new(text) {
        // SAFETY: errp as promised; "%s" takes one string; QEMU copies what it keeps, and the
        // names of file and function are static.
        unsafe {
            (api.symbols.error_setg_internal)(
                errp,
                c"vmcache".as_ptr(),
                0,
                c"vmcache".as_ptr(),
                c"%s".as_ptr(),
                text.as_ptr(),
            );
        }
    }
    -err.errno()
}

/// The string in a NUL-terminated array of a QEMU structure.
///
/// # Safety
/// As for [`field`], the field being an array of `char` with a terminating NUL.
pub(super) unsafe fn string_field<T>(object: *mut T, offset: u32) -> String {
    // SAFETY: a string within a live object (caller).
    unsafe { CStr::from_ptr(field::<T, c_char>(object, offset)) }.to_string_lossy().into_owned()
}

/// Copies a string into an array of a QEMU structure.
///
/// # Safety
/// As for [`field`], the field being an array of `size` `char`s.
pub(super) unsafe fn set_string_field<T>(
    object: *mut T,
    offset: u32,
    size: u32,
    text: &str,
) -> Result<()> {
    let bytes = text.as_bytes();
    if bytes.len() >= size as usize {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("'{text}' is longer than the {} bytes QEMU has for it", size - 1),
        ));
    }
    // SAFETY: `bytes.len() + 1 <= size` bytes of the array; the two do not overlap, one being
    // QEMU's and one ours.
    unsafe {
        let to = field::<T, u8>(object, offset);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        to.add(bytes.len()).write(0);
    }
    Ok(())
}

/// Takes an option that is one of a few words out of the dictionary; the first word is the default.
///
/// # Safety
/// `options` must be the dictionary that QEMU passed to `bdrv_open`.
pub(super) unsafe fn take_choice(
    api: &Api,
    options: *mut QDict,
    key: &'static CStr,
    choices: [&'static str; 2],
) -> Result<bool> {
    // SAFETY: a live dictionary and a C string; the value is copied before the key is deleted.
    let value = unsafe {
        if (api.symbols.qdict_haskey)(options, key.as_ptr()) == 0 {
            return Ok(true);
        }
        let text = (api.symbols.qdict_get_try_str)(options, key.as_ptr());
        let value = if text.is_null() {
            // From -blockdev a switch comes as a bool.
            let on = (api.symbols.qdict_get_try_bool)(options, key.as_ptr(), true);
            choices[usize::from(!on)].to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        };
        (api.symbols.qdict_del)(options, key.as_ptr());
        value
    };
    choices.iter().position(|choice| *choice == value).map(|index| index == 0).ok_or_else(|| {
        Error::new(
            ErrorKind::Invalid,
            format!(
                "{}={value}: it can be {} or {}",
                key.to_string_lossy(),
                choices[0],
                choices[1]
            ),
        )
    })
}

/// Takes an option that is a size in bytes out of the dictionary.
///
/// # Safety
/// `options` must be the dictionary that QEMU passed to `bdrv_open`.
pub(super) unsafe fn take_size(
    api: &Api,
    options: *mut QDict,
    key: &'static CStr,
) -> Result<Option<u64>> {
    // SAFETY: a live dictionary and a C string; the value is copied before the key is deleted.
    unsafe {
        if (api.symbols.qdict_haskey)(options, key.as_ptr()) == 0 {
            return Ok(None);
        }
        let text = (api.symbols.qdict_get_try_str)(options, key.as_ptr());
        let bytes = if text.is_null() {
            // From -blockdev a size comes as a number.
            let bytes = (api.symbols.qdict_get_try_int)(options, key.as_ptr(), -1);
            u64::try_from(bytes).map_err(|_| {
                Error::new(ErrorKind::Invalid, "not a number of bytes from 0 to 2^63 - 1")
            })
        } else {
            size::parse(&CStr::from_ptr(text).to_string_lossy())
        };
        (api.symbols.qdict_del)(options, key.as_ptr());
        let named = |err: Error| {
            Error::new(ErrorKind::Invalid, format!("{}: {err}", key.to_string_lossy()))
        };
        bytes.map(Some).map_err(named)
    }
}

/// A path as QEMU has it in a `filename` field.
pub(super) fn path(filename: &str) -> PathBuf {
    PathBuf::from(filename.strip_prefix("file:").unwrap_or(filename))
}
