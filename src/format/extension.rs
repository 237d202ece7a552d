//! vmcache's own header extension: quota, identity of the image and of its base, and the number of
//! checkpoints.
//!
//! ```text
//! byte   0  u32  version of the extension, 2
//!        4  u32  flags: bit 0 mtime and inode are known, bit 1 the sample hash is known, bit 2 the
//!                base was found changed, bit 3 so was the data that byte 96 names
//!        8  u64  quota in bytes, 0 for none
//!       16  [16] UUID of the image
//!       32  i64  base: modification time, seconds
//!       40  u32  base: modification time, nanoseconds
//!       44  u32  CRC32C of the header up to the end of the backing file name, with this word and
//!                the number of checkpoints taken for zero
//!       48  u64  base: inode
//!       56  [32] base: SHA-256 over sampled blocks
//!       88  u64  checkpoints so far; rewritten in place by each of them
//!       96  u64  guest offset of cached data that the base contradicted
//!      104       zero, up to 128
//! ```
//! All numbers are big-endian, as everything in qcow2.
//!
//! Used by `header`.

use crate::error::{Error, ErrorKind, Result};

/// Type of the extension in the header ("vmcc").
pub(super) const CACHE_EXTENSION: u32 = 0x766d_6363;
/// Bytes of the extension's data.
pub(super) const CACHE_EXTENSION_LEN: usize = 128;
/// Where the number of checkpoints stands in the data.
pub(super) const CHECKPOINTS_AT: usize = 88;
/// The end of what is ever used of the data.
pub(super) const CACHE_EXTENSION_USED: usize = 104;
/// Where the header's CRC stands in the data.
pub(super) const HEADER_CRC_AT: usize = 44;

const VERSION: u32 = 2;
const FLAG_LOCAL: u32 = 1;
const FLAG_SAMPLED: u32 = 2;
const FLAG_CHANGED: u32 = 4;
const FLAG_CONTRADICTED: u32 = 8;

/// What the base was when the cache was made from it. The size is the image's virtual size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseIdentity {
    /// Modification time (seconds, nanoseconds) and inode, where the base is a local file.
    pub local: Option<(i64, u32, u64)>,
    /// SHA-256 over sampled blocks, once a reader has taken it.
    pub sample: Option<[u8; 32]>,
    /// Set when an open found that the base is another one, until one finds it right again.
    pub changed: Option<BaseChange>,
}

/// How an open found that the base is not what the cache was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseChange {
    /// By its size or the sample.
    Whole,
    /// By sound cached data at this guest offset that the base contradicts.
    Data(u64),
}

/// The contents of the header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheExtension {
    /// Bytes that the image file may occupy, metadata included.
    pub quota: Option<u64>,
    /// Names this image among all others.
    pub uuid: [u8; 16],
    /// What the base was.
    pub base: BaseIdentity,
    /// Checkpoints so far.
    pub checkpoints: u64,
}

impl CacheExtension {
    pub(super) fn encode(&self) -> [u8; CACHE_EXTENSION_LEN] {
        let mut flags = 0;
        let (mut mtime, mut nanos, mut inode) = (0, 0, 0);
        if let Some(local) = self.base.local {
            flags |= FLAG_LOCAL;
            (mtime, nanos, inode) = local;
        }
        if self.base.sample.is_some() {
            flags |= FLAG_SAMPLED;
        }
        let mut contradicted = 0;
        if let Some(change) = self.base.changed {
            flags |= FLAG_CHANGED;
            if let BaseChange::Data(offset) = change {
                flags |= FLAG_CONTRADICTED;
                contradicted = offset;
            }
        }
        let mut data = Vec::with_capacity(CACHE_EXTENSION_LEN);
        data.extend_from_slice(&VERSION.to_be_bytes());
        data.extend_from_slice(&flags.to_be_bytes());
        data.extend_from_slice(&self.quota.unwrap_or(0).to_be_bytes());
        data.extend_from_slice(&self.uuid);
        data.extend_from_slice(&mtime.to_be_bytes());
        data.extend_from_slice(&nanos.to_be_bytes());
        data.extend_from_slice(&[0; 4]);
        data.extend_from_slice(&inode.to_be_bytes());
        data.extend_from_slice(&self.base.sample.unwrap_or_default());
        data.extend_from_slice(&self.checkpoints.to_be_bytes());
        data.extend_from_slice(&contradicted.to_be_bytes());
        let mut bytes = [0; CACHE_EXTENSION_LEN];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = from;
        }
        bytes
    }

    pub(super) fn decode(data: &[u8]) -> Result<Self> {
        let mut reader = Reader(data);
        let (version, flags) = (reader.u32()?, reader.u32()?);
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "vmcache header extension has version {version}, this build knows {VERSION}; \
                     make a new cache with 'vmcache create --force'"
                ),
            ));
        }
        let quota = reader.u64()?;
        let uuid = reader.array()?;
        let mtime = i64::from_be_bytes(reader.array()?);
        let nanos = reader.u32()?;
        let _header_crc = reader.u32()?;
        let inode = reader.u64()?;
        let sample = reader.array()?;
        let checkpoints = reader.u64()?;
        let contradicted = reader.u64()?;
        let change = match flags & FLAG_CONTRADICTED {
            0 => BaseChange::Whole,
            _ => BaseChange::Data(contradicted),
        };
        Ok(CacheExtension {
            quota: (quota != 0).then_some(quota),
            uuid,
            base: BaseIdentity {
                local: (flags & FLAG_LOCAL != 0).then_some((mtime, nanos, inode)),
                sample: (flags & FLAG_SAMPLED != 0).then_some(sample),
                changed: (flags & FLAG_CHANGED != 0).then_some(change),
            },
            checkpoints,
        })
    }
}

/// Takes big-endian numbers off the front of a slice; an error where it is too short.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let (front, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| Error::new(ErrorKind::Damaged, "the header is truncated"))?;
        self.0 = rest;
        Ok(front)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
