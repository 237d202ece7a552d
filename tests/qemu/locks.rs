//! vmcache and a plain QEMU on one image: readers get along, writers are kept out, and what a
//! writer did while nobody looked is noticed.

use crate::lab::{Lab, Server};
use crate::process::Tool;

/// A plain QEMU that writes to the cache image as the qcow2 that it is.
fn stock_write(cache: &crate::lab::Cache) -> Tool {
    Tool::stock("qemu-io").args(["-f", "qcow2", "-c", "write -P 0xEE 0 64k"]).arg(&cache.path)
}

#[test]
fn a_plain_qemu_cannot_write_while_vmcache_uses_the_image() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    let refused = stock_write(&cache).run().failure();
    assert!(refused.stderr.contains("Failed to get \"write\" lock"), "{refused:?}");
    server.assert_serves(&cache.base.content);
    server.stop();
    cache.assert_sound();
}

#[test]
fn a_plain_qemu_img_reads_while_vmcache_fills_the_image() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cache.assert_valid();
    Tool::stock("qemu-img").args(["info", "--backing-chain"]).arg(&cache.path).run().success();
    Tool::stock("qemu-img").args(["map", "-f", "qcow2"]).arg(&cache.path).run().success();
    server.stop();
    cache.assert_sound();
}

#[test]
fn a_plain_qemu_that_has_the_image_open_sees_the_base_while_vmcache_fills_it() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let image = cache.path.display().to_string();
    let plain = Server::start(&lab, Tool::stock("qemu-nbd"), &["-r", "-f", "qcow2", &image]);
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    server.stop();
    plain.assert_serves(&cache.base.content);
    plain.stop();
}

#[test]
fn vmcache_does_not_open_an_image_that_a_plain_qemu_writes() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let image = cache.path.display().to_string();
    let writer = Server::start(&lab, Tool::stock("qemu-nbd"), &["-f", "qcow2", &image]);
    let refused = Tool::driver("qemu-io")
        .args(["-r", "--image-opts", &cache.options(), "-c", "read 0 4k"])
        .run()
        .failure();
    assert!(refused.stderr.contains("lock"), "{refused:?}");
    assert!(refused.stderr.contains("another process") || refused.stderr.contains("writ"));
    writer.stop();
}

#[test]
fn nothing_of_an_image_is_used_after_a_plain_qemu_wrote_to_it() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let filling = lab.serve(&cache);
    filling.assert_serves(&cache.base.content);
    filling.stop();
    stock_write(&cache).run().success();

    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("something other than vmcache has written"), "{said:?}");
    assert_eq!(cache.info("state"), "damaged");
}

#[test]
fn a_repair_by_a_plain_qemu_img_changes_nothing_in_a_sound_image() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    server.stop();
    Tool::stock("qemu-img")
        .args(["check", "-r", "all", "-f", "qcow2"])
        .arg(&cache.path)
        .run()
        .success();
    cache.assert_sound();
}
