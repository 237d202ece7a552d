//! The running program, as far as a layout can be held against it: its exported symbols, its
//! registered drivers, and memory that is read only where it is known to be mapped.
//!
//! Used by `layout.rs`. Promises: no address, however wrong, makes a read fault; an address that
//! cannot be read safely is reported as such. In between is a trait, so that the comparison
//! itself is tested against made-up programs.

use std::ffi::{CStr, c_int, c_void};

use crate::qemu::symbols::{Symbols, lookup};

/// What a layout is compared with.
pub(super) trait Program {
    /// The address of an exported symbol.
    fn symbol(&self, name: &CStr) -> Option<usize>;

    /// The size in bytes that the symbol table gives for the object that starts at `address`.
    fn symbol_size(&self, address: usize) -> Option<usize>;

    /// The address of a registered driver.
    fn driver(&self, format_name: &CStr) -> Option<usize>;

    /// Copies `bytes.len()` bytes of the program's static memory. False when that range is not
    /// within one readable segment.
    fn read(&self, address: usize, bytes: &mut [u8]) -> bool;

    /// Whether the address lies in executable static memory.
    fn is_code(&self, address: usize) -> bool;

    /// Whether the address lies in readable static memory.
    fn is_mapped(&self, address: usize) -> bool {
        self.read(address, &mut [0])
    }

    /// The pointer at `address`.
    fn word(&self, address: usize) -> Option<usize> {
        let mut bytes = [0; size_of::<usize>()];
        self.read(address, &mut bytes).then(|| usize::from_ne_bytes(bytes))
    }
}

/// A range of memory that a loaded object (the program or a library) is mapped at.
struct Segment {
    start: usize,
    end: usize,
    code: bool,
}

/// The program this library is loaded into.
pub(in crate::qemu) struct Living<'a> {
    symbols: &'a Symbols,
    segments: Vec<Segment>,
}

impl<'a> Living<'a> {
    /// Takes stock of what is mapped now.
    pub(in crate::qemu) fn new(symbols: &'a Symbols) -> Self {
        let mut segments: Vec<Segment> = Vec::new();
        // SAFETY: `collect` takes the pointer for the vector it is, which outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(collect), (&raw mut segments).cast()) };
        Living { symbols, segments }
    }

    fn segment(&self, address: usize, len: usize) -> Option<&Segment> {
        let end = address.checked_add(len)?;
        self.segments.iter().find(|s| s.start <= address && end <= s.end)
    }
}

/// Notes the readable segments of one loaded object; never stops the iteration.
unsafe extern "C" fn collect(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    segments: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr passes a valid object and the pointer that `Living::new` gave it,
    // to which nothing else refers meanwhile.
    let (info, segments) = unsafe { (&*info, &mut *segments.cast::<Vec<Segment>>()) };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: dl_phdr_info says that so many program headers stand there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    segments.extend(
        headers
            .iter()
            .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_R != 0)
            .map(|header| {
                let start = (info.dlpi_addr as usize).wrapping_add(header.p_vaddr as usize);
                Segment {
                    start,
                    end: start.saturating_add(header.p_memsz as usize),
                    code: header.p_flags & libc::PF_X != 0,
                }
            }),
    );
    0
}

unsafe extern "C" {
    /// glibc's dladdr with one result more (dlfcn.h); the libc crate does not have it.
    fn dladdr1(
        address: *const c_void,
        info: *mut libc::Dl_info,
        extra: *mut *mut c_void,
        flags: c_int,
    ) -> c_int;
}

/// `RTLD_DL_SYMENT` of dlfcn.h: the extra result is the symbol table's entry.
const RTLD_DL_SYMENT: c_int = 1;

impl Program for Living<'_> {
    fn symbol(&self, name: &CStr) -> Option<usize> {
        lookup(name).map(|address| address.addr())
    }

    fn symbol_size(&self, address: usize) -> Option<usize> {
        let mut info = libc::Dl_info {
            dli_fname: std::ptr::null(),
            dli_fbase: std::ptr::null_mut(),
            dli_sname: std::ptr::null(),
            dli_saddr: std::ptr::null_mut(),
        };
        let mut entry: *mut c_void = std::ptr::null_mut();
        // SAFETY: dladdr1 takes any address and writes only to the two places given.
        let found = unsafe {
            dladdr1(address as *const c_void, &raw mut info, &raw mut entry, RTLD_DL_SYMENT)
        };
        if found == 0 || entry.is_null() || info.dli_saddr.addr() != address {
            return None;
        }
        // SAFETY: with RTLD_DL_SYMENT the entry is an Elf64_Sym of the loaded object's table.
        let size = unsafe { (*entry.cast::<libc::Elf64_Sym>()).st_size };
        Some(size as usize)
    }

    fn driver(&self, format_name: &CStr) -> Option<usize> {
        // SAFETY: called while block drivers are being registered, thus in the main thread, with
        // the name of a driver that is built in, for which no module is loaded.
        let driver = unsafe { (self.symbols.bdrv_find_format)(format_name.as_ptr()) };
        (!driver.is_null()).then(|| driver.addr())
    }

    fn read(&self, address: usize, bytes: &mut [u8]) -> bool {
        if self.segment(address, bytes.len()).is_none() {
            return false;
        }
        // SAFETY: the whole range is in a readable segment of a loaded object, and block drivers
        // and names, which is what callers read, are not written while drivers are registered.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len())
        };
        true
    }

    fn is_code(&self, address: usize) -> bool {
        self.segment(address, 1).is_some_and(|segment| segment.code)
    }
}

/// One of QEMU's objects on the heap, read at a layout's offsets; every read is inside the size
/// the layout gives, and that range has been found to be mapped.
pub(super) struct Object {
    start: *const u8,
    size: usize,
}

impl Object {
    /// The object at `pointer`, or `None` when it is NULL, unaligned, or not mapped throughout.
    ///
    /// # Safety
    /// The object must stay allocated while the result is used.
    pub(super) unsafe fn new<T>(pointer: *const T, size: usize) -> Option<Object> {
        let address = pointer.addr();
        if address == 0 || !address.is_multiple_of(align_of::<usize>()) || size == 0 {
            return None;
        }
        let page = page_size();
        let first = address - address % page;
        let len = address.checked_add(size)? - first;
        let mut residency = vec![0u8; len.div_ceil(page)];
        // SAFETY: mincore takes any page-aligned range, says ENOMEM when part of it is not
        // mapped, and writes one byte for each page, for which there is room.
        let mapped =
            unsafe { libc::mincore(first as *mut c_void, len, residency.as_mut_ptr().cast()) };
        if mapped == 0 {
            return Some(Object { start: pointer.cast(), size });
        }
        let err = std::io::Error::last_os_error();
        if err.raw_os_error() != Some(libc::ENOMEM) {
            log::warn!(
                "could not ask what is mapped: mincore: {err}; a seccomp filter must allow it"
            );
        }
        None
    }

    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let offset = offset as usize;
        if offset.checked_add(N)? > self.size {
            return None;
        }
        // SAFETY: the range lies in the object, which is mapped (`new`); QEMU's heap is readable;
        // an array of bytes needs no alignment.
        Some(unsafe { self.start.add(offset).cast::<[u8; N]>().read() })
    }

    /// The `int` at `offset`.
    pub(super) fn int(&self, offset: u32) -> Option<i32> {
        self.bytes(offset).map(i32::from_ne_bytes)
    }

    /// The `int64_t` at `offset`.
    pub(super) fn long(&self, offset: u32) -> Option<i64> {
        self.bytes(offset).map(i64::from_ne_bytes)
    }

    /// The pointer at `offset`.
    pub(super) fn pointer(&self, offset: u32) -> Option<usize> {
        self.bytes(offset).map(usize::from_ne_bytes)
    }

    /// The string in the array of `size` bytes at `offset`; `None` when it has no end there.
    pub(super) fn string(&self, offset: u32, size: u32) -> Option<&CStr> {
        if (offset as usize).checked_add(size as usize)? > self.size {
            return None;
        }
        // SAFETY: as for `bytes`; the caller of `new` keeps the object, and names do not change
        // while a node is being opened.
        let array =
            unsafe { std::slice::from_raw_parts(self.start.add(offset as usize), size as usize) };
        CStr::from_bytes_until_nul(array).ok()
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// The string at `address`, at most `max` bytes, byte by byte as far as it is mapped.
pub(super) fn read_string(program: &dyn Program, address: usize, max: usize) -> Option<Vec<u8>> {
    let mut string = Vec::new();
    let mut byte = [0u8];
    while string.len() < max {
        if !program.read(address.checked_add(string.len())?, &mut byte) {
            return None;
        }
        if byte[0] == 0 {
            return Some(string);
        }
        string.push(byte[0]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_read_inside_its_size_only() {
        let memory: Vec<u64> = vec![7, u64::MAX];
        // SAFETY: the vector lives to the end of the test.
        let object = unsafe { Object::new(memory.as_ptr(), 12) }.expect("a vector is mapped");

        assert_eq!(object.long(0), Some(7));
        assert_eq!(object.int(8), Some(-1));
        assert_eq!(object.int(9), None);
        assert_eq!(object.long(8), None);
        assert_eq!(object.pointer(u32::MAX), None);
        assert_eq!(object.string(0, 8), Some(c"\x07"));
        assert_eq!(object.string(8, 4), None);
        assert_eq!(object.string(8, 5), None);
    }

    #[test]
    fn an_address_that_is_not_mapped_is_no_object() {
        // SAFETY: nothing is read unless the range is mapped, which these are not.
        let objects = unsafe {
            [
                Object::new(std::ptr::null::<u64>(), 8).is_some(),
                Object::new(0x1000 as *const u64, 8).is_some(),
                Object::new(usize::MAX as *const u64, 8).is_some(),
                Object::new((usize::MAX - 15) as *const u64, 64).is_some(),
            ]
        };

        assert_eq!(objects, [false; 4]);
    }
}
