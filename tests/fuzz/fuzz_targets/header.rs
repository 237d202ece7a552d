//! The start of a file that may be anything: header, extensions, names. What is accepted must have
//! its tables where the layout puts them, and say the same when it is written out again. In most runs
//! the changed header gets the CRC it has to have, so that it is looked at and not only refused.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmcache::format::{
    BaseChange, BaseIdentity, CacheExtension, Geometry, HEADER_MAX, Header, Layout,
};
use vmcache_fuzz::seal;

#[derive(Arbitrary, Debug)]
struct Input {
    start: Start,
    /// Written over the start, at these offsets.
    changes: Vec<(u16, Vec<u8>)>,
    /// Bytes behind it.
    tail: Vec<u8>,
    cut: Option<u16>,
    /// Leave it with the CRC it has: seldom, since then it is refused.
    unsealed: u8,
    /// Otherwise as long as its tables.
    file_len: Option<u64>,
}

#[derive(Arbitrary, Debug)]
enum Start {
    Raw(Vec<u8>),
    Header {
        cluster_bits: u8,
        sectors: u64,
        backing_file: String,
        backing_format: String,
        quota: Option<u64>,
        local: Option<(i64, u32, u64)>,
        sample: Option<[u8; 32]>,
        changed: Option<Option<u64>>,
        checkpoints: u64,
    },
}

impl Start {
    /// The bytes, and the least length of the file.
    fn bytes(self) -> Option<(Vec<u8>, u64)> {
        match self {
            Start::Raw(bytes) => Some((bytes, 0)),
            Start::Header {
                cluster_bits,
                sectors,
                backing_file,
                backing_format,
                quota,
                local,
                sample,
                changed,
                checkpoints,
            } => {
                let size = sectors.checked_mul(512)?;
                let geometry = Geometry::new(14 + u32::from(cluster_bits % 8), size).ok()?;
                let changed = changed.map(|at| at.map_or(BaseChange::Whole, BaseChange::Data));
                let base = BaseIdentity { local, sample, changed };
                let cache = CacheExtension { quota, uuid: [7; 16], base, checkpoints };
                let header = Header::new(geometry, &backing_file, &backing_format, cache).ok()?;
                let layout = Layout::new(&geometry);
                Some((header.encode(), layout.offset(layout.data).0))
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let Some((mut bytes, least)) = input.start.bytes() else { return };
    for (at, change) in input.changes {
        let at = usize::from(at) % (bytes.len() + 1);
        let len = change.len().min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&change[..len]);
    }
    bytes.extend(input.tail);
    bytes.truncate(input.cut.map_or(HEADER_MAX, usize::from).min(HEADER_MAX));
    if input.unsealed % 8 != 1 {
        seal(&mut bytes);
    }
    let file_len = input.file_len.unwrap_or(least);
    let Ok(header) = Header::decode(&bytes, file_len) else { return };

    assert!(header.checkpoints_offset().0 + 8 <= bytes.len() as u64);
    let (at, note) = header.base_note(BaseIdentity::default());
    assert!(at.0 + note.len() as u64 <= bytes.len() as u64);
    if !header.trusted {
        return;
    }
    let layout = Layout::new(&header.geometry);
    assert!(layout.offset(layout.data).0 <= file_len);

    // Where the extension stands is the one thing that a rewritten header may change.
    let again = Header::decode(&header.encode(), file_len).expect("what was accepted is refused");
    assert_eq!(again.geometry, header.geometry);
    assert_eq!(again.backing_file, header.backing_file);
    assert_eq!(again.backing_format, header.backing_format);
    assert_eq!(again.cache, header.cache);
    assert!(again.trusted);
    assert_eq!(Header::decode(&again.encode(), file_len).unwrap(), again);
});
