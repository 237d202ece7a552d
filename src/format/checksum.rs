//! Checksums: four bytes for each subcluster in an area of the file of their own, behind the L2
//! tables, by guest subcluster. The area is no part of qcow2: nothing refers to its clusters and
//! their refcount is zero, so other programs take it for free space.
//!
//! | value | says of the subcluster |
//! |---|---|
//! | 0 | nothing was ever stored |
//! | 1 | it reads as zeros |
//! | other | CRC32C (RFC 3720, appendix B.4) over its number, little-endian, and its data |
//!
//! A CRC of 0 or 1 is stored as 2 or 3. The number is part of it so that data in the wrong place
//! does not pass. A checksum counts only where the L2 entry says that there is something: it is
//! written with the data, before the entry, and stays behind where the entry never came.
//!
//! Used by `image` and, through it, by `engine`.

use crc_fast::{CrcAlgorithm, Digest};

/// CRC32C over some pieces, one after the other.
pub(super) fn crc32c<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    pieces.into_iter().for_each(|piece| digest.update(piece));
    digest.finalize() as u32
}

/// The checksum of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u32);

impl Checksum {
    /// Bytes in the file, big-endian.
    pub const SIZE: usize = 4;
    /// Of a subcluster in which nothing was ever stored.
    pub const NONE: Self = Checksum(0);
    /// Of a subcluster that reads as zeros.
    pub const ZERO: Self = Checksum(1);

    /// Of data, a whole subcluster, `number` subclusters from the start of the disk.
    pub fn of(number: u64, data: &[u8]) -> Self {
        let crc = crc32c([&number.to_le_bytes(), data]);
        Checksum(if crc < 2 { crc + 2 } else { crc })
    }

    /// Its bytes in the file.
    pub fn encode(self) -> [u8; Self::SIZE] {
        self.0.to_be_bytes()
    }

    /// From its bytes in the file.
    pub fn decode(bytes: [u8; Self::SIZE]) -> Self {
        Checksum(u32::from_be_bytes(bytes))
    }
}
