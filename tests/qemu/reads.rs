//! Random reads through the driver, cold and warm, for every cluster size, format and protocol of
//! the base.

use std::thread;

use crate::lab::{DISK, Lab, Over, Server, anywhere, content, sequential};
use crate::settings::{number, random};

/// Configurations in `all_configurations`.
const CONFIGURATIONS: u64 = 24;
const ALL_READS: u64 = 100_000;
/// Connections, each with as many reads in flight as `qemu-nbd` allows: 32 together.
const CONNECTIONS: u64 = 2;

/// Reads at random in 32 places at once, all of which must show the base's content.
fn read_randomly(server: &Server, content: &[u8], reads: u64, purpose: &str) {
    thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let share = reads.div_ceil(CONNECTIONS) as usize;
            let random = random(&format!("{purpose} {number}"));
            let plan = anywhere(random, content.len()).take(share);
            scope.spawn(move || server.connect().read_and_compare(content, plan).expect("reads"));
        }
    });
}

fn random_reads_equal_the_base(format: &'static str, over: Over, cluster_size: &str) {
    let lab = Lab::new();
    let base = lab.base_of(content(DISK), format, over);
    let cache = lab.cache(&base, &format!("cluster_size={cluster_size}"));
    let configurations = if number("VMCACHE_TEST_FULL") == Some(1) { 1 } else { CONFIGURATIONS };
    let reads = ALL_READS.div_ceil(configurations) / 2;

    let cold = lab.serve(&cache);
    read_randomly(&cold, &base.content, reads, "cold");
    let rest = sequential(base.content.len(), 1 << 20);
    cold.connect().read_and_compare(&base.content, rest).expect("reads");
    let said = cold.stop();
    assert_eq!(said.stderr, "");
    cache.assert_sound();

    let before = cache.stats();
    let warm = lab.serve(&cache);
    read_randomly(&warm, &base.content, reads, "warm");
    warm.stop();
    let after = cache.stats();
    assert_eq!(after.since(&before, "base-reads"), 0);
    assert_eq!(after.get("dropped-bytes"), 0);
    cache.assert_sound();
}

macro_rules! all_configurations {
    ($($name:ident: $format:literal, $over:ident, $cluster_size:literal;)*) => {$(
        #[test]
        fn $name() {
            random_reads_equal_the_base($format, Over::$over, $cluster_size);
        }
    )*};
}

all_configurations! {
    random_reads_equal_a_raw_file_in_clusters_of_16_kib: "raw", File, "16K";
    random_reads_equal_a_raw_file_in_clusters_of_64_kib: "raw", File, "64K";
    random_reads_equal_a_raw_file_in_clusters_of_128_kib: "raw", File, "128K";
    random_reads_equal_a_raw_file_in_clusters_of_2_mib: "raw", File, "2M";
    random_reads_equal_a_qcow2_file_in_clusters_of_16_kib: "qcow2", File, "16K";
    random_reads_equal_a_qcow2_file_in_clusters_of_64_kib: "qcow2", File, "64K";
    random_reads_equal_a_qcow2_file_in_clusters_of_128_kib: "qcow2", File, "128K";
    random_reads_equal_a_qcow2_file_in_clusters_of_2_mib: "qcow2", File, "2M";
    random_reads_equal_raw_over_nfs_in_clusters_of_16_kib: "raw", Nfs, "16K";
    random_reads_equal_raw_over_nfs_in_clusters_of_64_kib: "raw", Nfs, "64K";
    random_reads_equal_raw_over_nfs_in_clusters_of_128_kib: "raw", Nfs, "128K";
    random_reads_equal_raw_over_nfs_in_clusters_of_2_mib: "raw", Nfs, "2M";
    random_reads_equal_qcow2_over_nfs_in_clusters_of_16_kib: "qcow2", Nfs, "16K";
    random_reads_equal_qcow2_over_nfs_in_clusters_of_64_kib: "qcow2", Nfs, "64K";
    random_reads_equal_qcow2_over_nfs_in_clusters_of_128_kib: "qcow2", Nfs, "128K";
    random_reads_equal_qcow2_over_nfs_in_clusters_of_2_mib: "qcow2", Nfs, "2M";
    random_reads_equal_raw_over_nbd_in_clusters_of_16_kib: "raw", Nbd, "16K";
    random_reads_equal_raw_over_nbd_in_clusters_of_64_kib: "raw", Nbd, "64K";
    random_reads_equal_raw_over_nbd_in_clusters_of_128_kib: "raw", Nbd, "128K";
    random_reads_equal_raw_over_nbd_in_clusters_of_2_mib: "raw", Nbd, "2M";
    random_reads_equal_qcow2_over_nbd_in_clusters_of_16_kib: "qcow2", Nbd, "16K";
    random_reads_equal_qcow2_over_nbd_in_clusters_of_64_kib: "qcow2", Nbd, "64K";
    random_reads_equal_qcow2_over_nbd_in_clusters_of_128_kib: "qcow2", Nbd, "128K";
    random_reads_equal_qcow2_over_nbd_in_clusters_of_2_mib: "qcow2", Nbd, "2M";
}
