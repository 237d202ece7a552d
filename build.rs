//! Makes the Rust side of the contract in `include/vmcache.h`, and names the shared library.
//!
//! The types come out of bindgen, with its tests that sizes, alignments and offsets are what the
//! C compiler says. `src/qemu/layout.rs` includes the result.

use std::env;
use std::path::PathBuf;

/// The shared library's soname. The number changes when `include/vmcache.h` changes in a way that
/// a C file compiled against the old one cannot live with.
const SONAME: &str = "libvmcache.so.0";

fn main() {
    // Naming any file replaces Cargo's default of every file in the package.
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=include/vmcache.h");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,{SONAME}");
    // The command line looks for an installed library under this name.
    println!("cargo:rustc-env=VMCACHE_SONAME={SONAME}");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("Cargo sets OUT_DIR")).join("vmcache.rs");
    bindgen::Builder::default()
        .header("include/vmcache.h")
        .allowlist_type("vmcache_.*")
        .allowlist_function("vmcache_.*")
        .rust_edition(bindgen::RustEdition::Edition2024)
        .layout_tests(true)
        .derive_default(false)
        .prepend_enum_name(false)
        .generate()
        .expect("include/vmcache.h is C that bindgen understands; it needs libclang")
        .write_to_file(&out)
        .unwrap_or_else(|err| panic!("could not write '{}': {err}", out.display()));
}
