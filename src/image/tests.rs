//! Image files on a real filesystem, with `qemu-img` as the oracle.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;
use crate::format::{
    BaseIdentity, Checksum, Geometry, HostOffset, L2Entry, SUBCLUSTERS, SubclusterBits,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A base of random bytes and an image for it.
struct Fixture {
    dir: TempDir,
    geometry: Geometry,
    content: Vec<u8>,
}

impl Fixture {
    fn new(cluster_size: u64, size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..size).map(|at| (at * 31 + at / 251 + 1) as u8).collect();
        fs::write(dir.path().join("base.raw"), &content).unwrap();
        let geometry = Geometry::with_cluster_size(cluster_size, size).unwrap();
        let fixture = Fixture { dir, geometry, content };
        create(&fixture.path(), &fixture.options()).unwrap();
        fixture
    }

    fn options(&self) -> CreateOptions {
        CreateOptions {
            backing_file: self.dir.path().join("base.raw").to_str().unwrap().into(),
            backing_format: "raw".into(),
            geometry: self.geometry,
            quota: None,
            base: BaseIdentity::default(),
            mode: 0o640,
            force: false,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("cache.qcow2")
    }

    fn open(&self) -> Image {
        Image::open(&self.path(), Access::ReadWrite).unwrap()
    }

    fn scan(&self) -> Scan {
        let image = self.open();
        let mut scan = Scan::read(&image, |_, _| {}).unwrap();
        scan.verify_data(&image, |_, _| {}).unwrap();
        scan
    }

    /// Stores guest clusters as a checkpoint would, the first at data cluster `place`.
    fn store(&self, clusters: std::ops::Range<u64>, place: u64) {
        let image = self.open();
        let size = self.geometry.cluster_size();
        for (index, cluster) in clusters.clone().enumerate() {
            let number = image.layout().data + place + index as u64;
            let host = image.layout().offset(number);
            let start = (cluster * size) as usize;
            let data = &self.content[start..start + size as usize];
            image.write(data, host).unwrap();
            let unit = self.geometry.subcluster_size() as usize;
            let first = cluster * u64::from(SUBCLUSTERS);
            let subclusters = (first..).zip(data.chunks_exact(unit));
            let checksums: Vec<Checksum> =
                subclusters.map(|(number, data)| Checksum::of(number, data)).collect();
            image.write_checksums(first, &checksums).unwrap();
            image.write_refcounts(number, 1, 1).unwrap();
            let entry = L2Entry { host: Some(host), bits: SubclusterBits::new(u32::MAX, 0) };
            image.write_l2_entries(cluster, &[entry]).unwrap();
        }
    }

    /// Overwrites an L2 entry.
    fn overwrite(&self, cluster: u64, entry: L2Entry) {
        self.open().write_l2_entries(cluster, &[entry]).unwrap();
    }

    fn repair(&self) {
        repair(&self.open(), &self.scan()).unwrap();
    }

    fn assert_sound(&self) {
        let scan = self.scan();
        assert!(scan.errors() == 0 && scan.leaks.is_empty(), "{scan:?}");
        assert_eq!(check_code(&self.path()), 0);
        let base = self.dir.path().join("base.raw");
        let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw"], &[&self.path(), &base]);
        assert!(compared.status.success(), "{compared:?}");
    }
}

fn qemu_img(args: &[&str], files: &[&Path]) -> Output {
    Command::new("qemu-img").args(args).args(files).output().unwrap()
}

fn check_code(path: &Path) -> i32 {
    qemu_img(&["check", "-f", "qcow2"], &[path]).status.code().unwrap()
}

fn is_sound_when_new(cluster_size: u64, size: u64) {
    let fixture = Fixture::new(cluster_size, size);
    fixture.assert_sound();
    assert!(fixture.scan().entries.is_empty());
}

#[test]
fn new_image_is_sound_with_every_cluster_size() {
    for bits in 14..=21 {
        is_sound_when_new(1 << bits, MIB + 512);
    }
}

#[test]
fn new_image_of_one_sector_is_sound() {
    is_sound_when_new(128 * KIB, 512);
}

#[test]
fn new_image_of_a_tebibyte_is_sound_and_small() {
    let fixture = Fixture::new(128 * KIB, 512);
    let base = fixture.dir.path().join("large.raw");
    fs::File::create(&base).unwrap().set_len(1 << 40).unwrap();
    let path = fixture.dir.path().join("large.qcow2");
    let geometry = Geometry::new(17, 1 << 40).unwrap();
    let backing_file = base.to_str().unwrap().into();
    create(&path, &CreateOptions { geometry, backing_file, ..fixture.options() }).unwrap();
    assert_eq!(check_code(&path), 0);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 256 * KIB);
}

#[test]
fn image_with_stored_clusters_is_sound() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(3..9, 2);
    fixture.assert_sound();
    assert_eq!(fixture.scan().entries.keys().copied().collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8]);
}

#[test]
fn existing_file_is_not_replaced() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let before = fs::read(fixture.path()).unwrap();
    let err = create(&fixture.path(), &fixture.options()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Exists);
    assert!(fs::read(fixture.path()).unwrap() == before);
}

#[test]
fn existing_file_is_replaced_with_force() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let before = fixture.open().header().cache.uuid;
    create(&fixture.path(), &CreateOptions { force: true, ..fixture.options() }).unwrap();
    assert_ne!(fixture.open().header().cache.uuid, before);
}

#[test]
fn failed_create_leaves_nothing_behind() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let missing = fixture.dir.path().join("no/such/directory/cache");
    let refused = create(&missing, &fixture.options()).unwrap_err();
    let existing = create(&fixture.path(), &fixture.options()).unwrap_err();
    assert_eq!((refused.errno(), existing.kind()), (libc::ENOENT, ErrorKind::Exists));
    assert_eq!(fs::read_dir(fixture.dir.path()).unwrap().count(), 2);
}

#[test]
fn quota_below_the_tables_is_refused() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let options = CreateOptions { quota: Some(64 * KIB), ..fixture.options() };
    let err = create(&fixture.dir.path().join("other"), &options).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Invalid);
}

#[test]
fn new_image_has_the_mode_that_was_asked_for() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let mode = fs::metadata(fixture.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o700, 0o600);
}

#[test]
fn directory_is_not_an_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    assert!(Image::open(fixture.dir.path(), Access::ReadWrite).is_err());
    let err = Image::open(fixture.dir.path(), Access::ReadOnly).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotACache);
}

#[test]
fn base_is_not_an_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let err = Image::open(&fixture.dir.path().join("base.raw"), Access::ReadOnly).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotACache);
}

#[test]
fn ordinary_qcow2_is_not_an_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let path = fixture.dir.path().join("other.qcow2");
    Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "extended_l2=on"])
        .arg(&path)
        .arg("1M")
        .status()
        .unwrap();
    let err = Image::open(&path, Access::ReadOnly).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotACache);
}

#[test]
fn empty_file_is_not_an_image() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let path = fixture.dir.path().join("empty");
    fs::write(&path, "").unwrap();
    let err = Image::open(&path, Access::ReadOnly).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotACache);
}

#[test]
fn truncated_image_is_refused() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let layout = *fixture.open().layout();
    let file = fs::OpenOptions::new().write(true).open(fixture.path()).unwrap();
    file.set_len(layout.offset(layout.data).0 - 1).unwrap();
    let err = Image::open(&fixture.path(), Access::ReadOnly).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Damaged);
}

#[test]
fn leaked_clusters_are_found_as_qemu_finds_them() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let image = fixture.open();
    let data = image.layout().data;
    image.write_refcounts(data + 1, 3, 1).unwrap();
    // QEMU looks at refcounts of clusters within the file alone.
    image.write(&[1; 512], image.layout().offset(data + 3)).unwrap();
    let scan = fixture.scan();
    assert_eq!(scan.leaks.as_slice(), std::slice::from_ref(&(data + 1..data + 4)));
    assert_eq!((scan.damages, check_code(&fixture.path())), (0, 3));
}

#[test]
fn leaked_clusters_are_given_back() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..2, 5);
    let image = fixture.open();
    image.write_refcounts(image.layout().data + 1, 3, 1).unwrap();
    free_leaks(&image, &fixture.scan()).unwrap();
    fixture.assert_sound();
}

#[test]
fn repair_of_a_sound_image_changes_nothing() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..4, 0);
    let before = fs::read(fixture.path()).unwrap();
    fixture.repair();
    assert!(fs::read(fixture.path()).unwrap() == before);
}

/// Damage is found, and repaired so that QEMU finds nothing either.
fn is_found_and_repaired(damage: impl FnOnce(&Fixture)) {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..8, 0);
    damage(&fixture);
    let errors = fixture.scan().errors();
    fixture.repair();
    assert_ne!(errors, 0);
    fixture.assert_sound();
}

#[test]
fn flipped_bit_of_data_is_found_and_costs_one_subcluster() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..8, 0);
    let image = fixture.open();
    let at = HostOffset(image.layout().offset(image.layout().data + 3).0 + 5 * 2 * KIB + 77);
    let mut byte = [0];
    image.read(&mut byte, at).unwrap();
    image.write(&[byte[0] ^ 4], at).unwrap();
    let bad = fixture.scan().bad;
    fixture.repair();
    assert_eq!(bad, [(3, 1 << 5)].into());
    let left: u32 =
        fixture.scan().entries.values().map(|entry| entry.bits.data().count_ones()).sum();
    assert_eq!(left, 8 * 32 - 1);
    fixture.assert_sound();
}

#[test]
fn data_that_says_it_is_zero_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        fixture.overwrite(3, L2Entry { host: None, bits: SubclusterBits::new(0, 1) });
    });
}

#[test]
fn zeros_that_were_never_stored_are_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        fixture.overwrite(12, L2Entry { host: None, bits: SubclusterBits::new(0, 1 << 31) });
    });
}

#[test]
fn checksum_of_garbage_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write(&[0x5a; 4], image.layout().checksum_offset(3 * 32 + 7)).unwrap();
    });
}

#[test]
fn data_lost_in_a_hole_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let first = image.layout().data + 2;
        image.discard(std::iter::once(first..first + 1), image.layout().end).unwrap();
    });
}

#[test]
fn data_cut_off_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let len = image.layout().offset(image.layout().data + 6).0 + 123;
        image.file().set_len(len).unwrap();
    });
}

#[test]
fn entry_of_garbage_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write(&[0xff; 16], image.layout().l2_entry_offset(3)).unwrap();
    });
}

#[test]
fn place_within_the_tables_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let host = Some(HostOffset(64 * KIB));
        fixture.overwrite(3, L2Entry { host, bits: SubclusterBits(1) });
    });
}

#[test]
fn place_beyond_the_file_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let host = Some(image.layout().offset(image.layout().end - 1));
        fixture.overwrite(3, L2Entry { host, bits: SubclusterBits(1) });
    });
}

#[test]
fn place_far_beyond_everything_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let host = Some(HostOffset((1 << 55) - 64 * KIB));
        fixture.overwrite(3, L2Entry { host, bits: SubclusterBits(1) });
    });
}

#[test]
fn place_without_data_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let host = Some(image.layout().offset(image.layout().data + 3));
        fixture.overwrite(3, L2Entry { host, bits: SubclusterBits::default() });
    });
}

#[test]
fn place_of_two_clusters_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let host = Some(image.layout().offset(image.layout().data + 2));
        fixture.overwrite(5, L2Entry { host, bits: SubclusterBits(1) });
    });
}

#[test]
fn place_of_three_clusters_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        let host = Some(image.layout().offset(image.layout().data + 2));
        fixture.overwrite(5, L2Entry { host, bits: SubclusterBits(1) });
        fixture.overwrite(6, L2Entry { host, bits: SubclusterBits(1) });
    });
}

#[test]
fn cluster_in_use_without_refcount_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write_refcounts(image.layout().data + 2, 1, 0).unwrap();
    });
}

#[test]
fn cluster_with_two_references_by_its_refcount_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write_refcounts(image.layout().data + 2, 1, 2).unwrap();
    });
}

#[test]
fn table_without_refcount_is_found_and_repaired() {
    is_found_and_repaired(|fixture| fixture.open().write_refcounts(0, 2, 0).unwrap());
}

#[test]
fn l1_table_of_garbage_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write(&[0x11; 8], image.layout().offset(image.layout().l1_table)).unwrap();
    });
}

#[test]
fn refcount_table_of_garbage_is_found_and_repaired() {
    is_found_and_repaired(|fixture| {
        let image = fixture.open();
        image.write(&[0x11; 8], image.layout().refcount_table_offset()).unwrap();
    });
}

#[test]
fn l2_tables_full_of_garbage_are_survived() {
    let fixture = Fixture::new(16 * KIB, MIB);
    let image = fixture.open();
    let garbage: Vec<u8> = (0..64 * 16u32).map(|at| (at * 167 + at / 7) as u8).collect();
    image.write(&garbage, image.layout().l2_entry_offset(0)).unwrap();
    fixture.repair();
    fixture.assert_sound();
}

#[test]
fn refcounts_full_of_garbage_are_survived() {
    let fixture = Fixture::new(16 * KIB, MIB);
    fixture.store(0..8, 0);
    let image = fixture.open();
    let all = image.layout().end;
    image.write(&vec![0x5a; all as usize * 2], image.layout().refcount_offset(0)).unwrap();
    fixture.repair();
    fixture.assert_sound();
}

#[test]
fn clusters_that_nothing_refers_to_are_given_back_to_the_filesystem() {
    let fixture = Fixture::new(64 * KIB, 4 * MIB);
    fixture.store(0..1, 9);
    let image = fixture.open();
    let garbage = vec![0xcc; MIB as usize];
    image
        .write(&garbage[..512 * KIB as usize], image.layout().offset(image.layout().data))
        .unwrap();
    image.write(&garbage, image.layout().offset(image.layout().data + 10)).unwrap();
    let before = image.occupied().unwrap();
    discard_unused(&image, &fixture.scan());
    let gained = before - image.occupied().unwrap();
    assert_eq!(gained, 1536 * KIB);
    fixture.assert_sound();
}

#[test]
fn free_clusters_are_those_between_used_ones() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..2, 1);
    fixture.store(5..6, 4);
    let (image, scan) = (fixture.open(), fixture.scan());
    let data = image.layout().data;
    assert_eq!(scan.free_clusters(&image).collect::<Vec<_>>(), [data, data + 3]);
    assert_eq!(scan.end, data + 5);
}

#[test]
fn place_at_the_end_of_a_huge_disk_takes_no_time_to_look_at() {
    let dir = tempfile::tempdir().unwrap();
    let geometry = Geometry::with_cluster_size(16 * KIB, 15 << 40).unwrap();
    let base = BaseIdentity::default();
    let (backing_file, backing_format) = ("base.raw".into(), "raw".into());
    let options = CreateOptions {
        backing_file,
        backing_format,
        geometry,
        quota: None,
        base,
        mode: 0o600,
        force: false,
    };
    create(&dir.path().join("cache"), &options).unwrap();
    let image = Image::open(&dir.path().join("cache"), Access::ReadWrite).unwrap();
    let (first, last) = (image.layout().data, image.layout().end - 1);
    let host = image.layout().offset(last);
    image.write(b"data", host).unwrap();
    image.write_refcounts(last, 1, 1).unwrap();
    let bits = SubclusterBits::new(1, 0);
    image.write_l2_entries(7, &[L2Entry { host: Some(host), bits }]).unwrap();
    let started = Instant::now();
    let scan = Scan::read(&image, |_, _| {}).unwrap();
    let free: Vec<_> = scan.free_runs(&image).collect();
    assert_eq!(scan.damages, 0);
    assert!(free.iter().eq(std::iter::once(&(first..last))), "{free:?}");
    assert_eq!(scan.free_clusters(&image).take(2).count(), 2);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[test]
fn writer_and_readers_of_vmcache_get_along() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let _others = [fixture.open(), fixture.open()];
    assert!(Image::open(&fixture.path(), Access::ReadOnly).is_ok());
}

#[test]
fn image_that_is_open_for_writing_elsewhere_is_busy() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let file = fs::OpenOptions::new().read(true).write(true).open(fixture.path()).unwrap();
    let write_permission = 101;
    crate::lock::try_lock(&file, write_permission, crate::lock::LockKind::Shared).unwrap();
    let err = Image::open(&fixture.path(), Access::ReadWrite).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Busy);
}

#[test]
fn number_of_checkpoints_is_rewritten_in_place() {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.open().write_checkpoints(0x0102_0304_0506_0708).unwrap();
    assert_eq!(fixture.open().read_checkpoints().unwrap(), 0x0102_0304_0506_0708);
    assert_eq!(fixture.open().header().cache.checkpoints, 0x0102_0304_0506_0708);
    fixture.assert_sound();
}

#[test]
fn header_with_a_byte_changed_is_opened_or_refused_but_never_misread() {
    let fixture = Fixture::new(64 * KIB, MIB);
    let file = fs::OpenOptions::new().read(true).write(true).open(fixture.path()).unwrap();
    let mut before = [0];
    for at in 0..112 {
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(&[before[0] ^ 0x81], at).unwrap();
        if let Ok(image) = Image::open(&fixture.path(), Access::ReadOnly) {
            let _ = Scan::read(&image, |_, _| {});
        }
        file.write_all_at(&before, at).unwrap();
    }
    fixture.assert_sound();
}

/// Refuses everything after so many operations.
#[derive(Debug)]
struct CutOff(std::sync::atomic::AtomicUsize);

impl Observer for CutOff {
    fn before(&self, _: Operation<'_>) -> std::io::Result<usize> {
        let order = std::sync::atomic::Ordering::Relaxed;
        let left = self.0.fetch_update(order, order, |left| left.checked_sub(1));
        left.map(|_| usize::MAX).map_err(|_| std::io::Error::from_raw_os_error(libc::EIO))
    }

    fn after(&self, _: Operation<'_>) {}
}

/// Two clusters with one place, and a repair that is cut off: what it leaves does not pass for sound.
fn repair_cut_off_after(operations: usize) {
    let fixture = Fixture::new(64 * KIB, MIB);
    fixture.store(0..4, 0);
    let image = fixture.open();
    fixture.overwrite(
        2,
        L2Entry {
            host: Some(image.layout().offset(image.layout().data)),
            bits: SubclusterBits::new(u32::MAX, 0),
        },
    );
    let scan = fixture.scan();
    let observer = Some(std::sync::Arc::new(CutOff(operations.into())) as _);
    let cut = Image::open_observed(&fixture.path(), Access::ReadWrite, observer).unwrap();
    let _ = repair(&cut, &scan);
    // What was not dropped yet has the wrong checksums.
    let left = fixture.scan();
    assert!(left.errors() != 0 || !left.entries.contains_key(&2), "after {operations}: {left:?}");
    fixture.repair();
    fixture.assert_sound();
}

#[test]
fn repair_that_is_cut_off_leaves_no_image_that_looks_sound() {
    (0..12).for_each(repair_cut_off_after);
}
