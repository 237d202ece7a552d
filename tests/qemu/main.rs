//! The driver inside real, unmodified QEMU programs: `qemu-io`, `qemu-img`, `qemu-nbd` and
//! `qemu-system-x86_64` with the library preloaded. The oracle is the base's content in memory, and
//! the same programs without the library.
//!
//! Run by `scripts/test`, which builds the library and starts the NFS server; a bare `cargo test`
//! leaves this crate out. Settings, all environment variables:
//!
//! | variable | what it says |
//! |---|---|
//! | `VMCACHE_TEST_QEMU` | words, one a line, in front of every QEMU program: enter where another series is |
//! | `VMCACHE_TEST_LIBRARY` | the library to preload (default: beside the `vmcache` binary) |
//! | `VMCACHE_TEST_PATCHED` | build directory of a QEMU that has the driver in its tree: its programs run wherever the driver is needed |
//! | `VMCACHE_TEST_PATCHED_LIBRARY` | the directory in which that QEMU finds `libvmcache.so.0` |
//! | `VMCACHE_TEST_NFS` | URL of a directory that an NFS server exports |
//! | `VMCACHE_TEST_NFS_DIRECTORY` | the same directory by its local path |
//! | `VMCACHE_TEST_SEED` | seed of everything random (default: a new one, printed) |
//! | `VMCACHE_TEST_FULL` | `1`: 100,000 random reads in each configuration, not in all together; stops of 60 s |
//! | `VMCACHE_TORTURE_SECONDS`, `VMCACHE_TORTURE_KILLS` | least length of the torture run |
//!
//! | module | what is in it |
//! |---|---|
//! | `settings` | the variables above |
//! | `process` | QEMU's programs as child processes that never outlive their test |
//! | `nbd` | a client for `qemu-nbd`, with many reads in flight |
//! | `lab` | bases, caches, servers, and what a plain QEMU says about them |
//! | `trace` | `strace`: deaths at exact moments, calls that take long |
//! | `monitor` | a QEMU's monitor, by QMP |
//! | `virtio` | a machine without a guest whose disks the test drives itself, queue by queue |
//! | `mounts` | small filesystems that only the test sees |
//! | `patched` | the tests that need the driver in QEMU's tree; left out in an unmodified one |
//! | all others | the tests |

mod bases;
mod checkpoints;
mod deaths;
mod faults;
mod iothreads;
mod jobs;
mod lab;
mod locks;
mod monitor;
mod mounts;
mod nbd;
mod node;
mod options;
mod patched;
mod process;
mod quota;
mod reads;
mod rot;
mod settings;
mod sharing;
mod stops;
mod system;
mod tools;
mod torture;
mod trace;
mod trust;
mod virtio;
mod writes;
