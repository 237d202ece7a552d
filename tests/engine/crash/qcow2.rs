//! A qcow2 reader for states in memory, written from the specification alone and sharing nothing
//! with the library: what `qemu-img check` and `qemu-img compare` would say, thousands of times a
//! second. The checker holds it against the real ones.

use vmcache::format::ByteRange;

const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const SUBCLUSTERS: u64 = 32;

/// What a file shows.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What `qemu-img check` would call an error.
    pub errors: Vec<String>,
    /// Clusters with a refcount above the number of their references.
    pub leaks: u64,
    /// Where the disk first differs from the base.
    pub differs_at: Option<u64>,
    /// For each subcluster of the disk, whether the file answers for it.
    held: Vec<bool>,
    subcluster_size: u64,
}

impl Verdict {
    /// The exit code of `qemu-img check`.
    pub fn code(&self) -> i32 {
        match (self.errors.len(), self.leaks) {
            (0, 0) => 0,
            (0, _) => 3,
            _ => 2,
        }
    }

    /// The first of these bytes that the file does not answer for.
    pub fn lacks(&self, wanted: &[ByteRange]) -> Option<u64> {
        wanted
            .iter()
            .flat_map(|range| {
                range.start / self.subcluster_size..range.end().div_ceil(self.subcluster_size)
            })
            .find(|subcluster| !self.held[*subcluster as usize])
            .map(|subcluster| subcluster * self.subcluster_size)
    }
}

fn number(bytes: &[u8], at: u64, len: usize) -> u64 {
    bytes[at as usize..][..len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads a whole file over its base.
pub fn examine(file: &[u8], base: &[u8]) -> Verdict {
    let cluster = 1u64 << number(file, 20, 4);
    let mut reader = Reader {
        file,
        base,
        cluster,
        refcount_table: (number(file, 48, 8), number(file, 56, 4) * cluster / 8),
        references: vec![0; (file.len() as u64).div_ceil(cluster) as usize],
        verdict: Verdict { subcluster_size: cluster / SUBCLUSTERS, ..Verdict::default() },
    };
    reader.refer(0, 1, "the header");
    reader.refcount_blocks();
    reader.l1_table();
    reader.refcounts();
    reader.verdict
}

struct Reader<'a> {
    file: &'a [u8],
    base: &'a [u8],
    cluster: u64,
    /// Offset and entries.
    refcount_table: (u64, u64),
    references: Vec<u64>,
    verdict: Verdict,
}

impl Reader<'_> {
    fn refer(&mut self, at: u64, clusters: u64, what: &str) -> bool {
        let first = at / self.cluster;
        let sound =
            at.is_multiple_of(self.cluster) && first + clusters <= self.references.len() as u64;
        if !sound {
            self.verdict.errors.push(format!("{what} at {at:#x} is not in the file"));
            return false;
        }
        (first..first + clusters).for_each(|index| self.references[index as usize] += 1);
        true
    }

    fn refcount_blocks(&mut self) {
        let (at, entries) = self.refcount_table;
        self.refer(at, entries * 8 / self.cluster, "the refcount table");
        for index in 0..entries {
            let block = number(self.file, at + index * 8, 8);
            if block != 0 {
                self.refer(block, 1, "a refcount block");
            }
        }
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let per_block = self.cluster / 2;
        let (at, entries) = self.refcount_table;
        let index = cluster / per_block;
        let block = if index < entries { number(self.file, at + index * 8, 8) } else { 0 };
        if block == 0 { 0 } else { number(self.file, block + cluster % per_block * 2, 2) }
    }

    /// "Refcount is exactly one", as an entry of the L1 or an L2 table has it.
    fn check_copied(&mut self, entry: u64, what: &str) {
        if (entry & COPIED != 0) != (self.refcount((entry & OFFSET) / self.cluster) == 1) {
            self.verdict.errors.push(format!("{what} {entry:#x}: COPIED against the refcount"));
        }
    }

    fn l1_table(&mut self) {
        let (entries, at) = (number(self.file, 36, 4), number(self.file, 40, 8));
        self.refer(at, (entries * 8).div_ceil(self.cluster), "the L1 table");
        for index in 0..entries {
            let entry = number(self.file, at + index * 8, 8);
            self.check_copied(entry, "L1 entry");
            if self.refer(entry & OFFSET, 1, "an L2 table") {
                self.l2_table(entry & OFFSET, index * (self.cluster / 16));
            }
        }
        let subclusters = (self.base.len() as u64).div_ceil(self.verdict.subcluster_size);
        self.verdict.held.resize(subclusters as usize, false);
    }

    fn l2_table(&mut self, at: u64, first: u64) {
        for index in 0..self.cluster / 16 {
            let entry = number(self.file, at + index * 16, 8);
            let bits = number(self.file, at + index * 16 + 8, 8);
            let host = entry & OFFSET;
            if host != 0 {
                self.check_copied(entry, "L2 entry");
                if !self.refer(host, 1, "data") {
                    continue;
                }
            }
            for subcluster in 0..SUBCLUSTERS {
                let (data, zero) =
                    (bits >> subcluster & 1 != 0, bits >> (subcluster + 32) & 1 != 0);
                self.subcluster((first + index) * SUBCLUSTERS + subcluster, host, data, zero);
            }
        }
    }

    fn subcluster(&mut self, guest: u64, host: u64, data: bool, zero: bool) {
        let size = self.verdict.subcluster_size;
        let start = guest * size;
        if start >= self.base.len() as u64 {
            return;
        }
        if data && (zero || host == 0) {
            self.verdict.errors.push(format!("subcluster {guest} is data and something else"));
            return;
        }
        let len = size.min(self.base.len() as u64 - start) as usize;
        let base = &self.base[start as usize..][..len];
        let from = (host + guest % SUBCLUSTERS * size) as usize;
        let equal = match (data, zero) {
            (true, _) => self.file.get(from..from + len) == Some(base),
            (_, true) => base.iter().all(|byte| *byte == 0),
            _ => true,
        };
        if !equal {
            self.verdict.differs_at.get_or_insert(start);
        }
        self.verdict.held.resize(guest as usize, false);
        self.verdict.held.push(data || zero);
    }

    fn refcounts(&mut self) {
        for cluster in 0..self.references.len() as u64 {
            let (expected, found) = (self.references[cluster as usize], self.refcount(cluster));
            if found < expected {
                let what = format!("cluster {cluster} has refcount {found}, not {expected}");
                self.verdict.errors.push(what);
            }
            self.verdict.leaks += u64::from(found > expected);
        }
    }
}
