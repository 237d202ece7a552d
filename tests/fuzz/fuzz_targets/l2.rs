//! One L2 entry of any bytes: what is accepted names an aligned place, has no subcluster that is two
//! things, and is written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmcache::format::{Geometry, L2Entry, Layout};

fuzz_target!(|input: (u8, u64, [u8; 16])| {
    let (bits, size, bytes) = input;
    let Ok(geometry) = Geometry::new(14 + u32::from(bits % 8), size / 512 * 512) else { return };
    let Ok(entry) = L2Entry::decode(bytes, &geometry) else { return };

    assert_eq!(entry.encode(), bytes);
    assert_eq!(entry.bits.data() & entry.bits.zero(), 0);
    assert!(entry.host.is_some() || entry.bits.data() == 0);
    if let Some(host) = entry.host {
        let layout = Layout::new(&geometry);
        let area = layout.offset(layout.data).0..layout.offset(layout.end).0;
        assert_eq!(host.0 % geometry.cluster_size(), 0);
        assert_eq!(layout.is_data_cluster(host), area.contains(&host.0));
    }
});
