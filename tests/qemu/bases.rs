//! A base that is not what the cache was made from: the cache steps aside, or refuses if told to.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime};

use crate::lab::{Cache, Lab};
use crate::process::{Output, Tool};

/// A cache that holds everything, and its base open for writing.
fn warm(lab: &Lab) -> (Cache, File) {
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    server.stop();
    let base = File::options().write(true).open(&cache.base.file).expect("the base");
    (cache, base)
}

/// Opens the cache, which must serve `content` and say one thing.
fn bypasses(lab: &Lab, cache: &Cache, content: &[u8]) -> Output {
    let occupied = cache.occupied();
    let server = lab.serve(cache);
    server.assert_serves(content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert_eq!(cache.occupied(), occupied);
    said
}

fn refuses(cache: &Cache) -> Output {
    let options = format!("{},base-changed=refuse", cache.options());
    Tool::driver("qemu-io")
        .args(["-r", "--image-opts", &options, "-c", "read 0 4k"])
        .run()
        .failure()
}

#[test]
fn a_base_that_was_written_to_is_read_itself() {
    let lab = Lab::new();
    let (cache, base) = warm(&lab);
    let mut content = cache.base.content.to_vec();
    content[5000..6000].fill(0x77);
    base.write_all_at(&content[5000..6000], 5000).expect("a write");
    base.set_modified(SystemTime::now() + Duration::from_secs(1)).expect("a time");
    let said = bypasses(&lab, &cache, &content);
    assert!(said.stderr.contains("the base was modified"), "{said:?}");
    assert_eq!(cache.info("state"), "stale");
}

#[test]
fn a_base_that_grew_is_read_itself_in_its_new_length() {
    let lab = Lab::new();
    let (cache, base) = warm(&lab);
    let mut content = cache.base.content.to_vec();
    content.resize(content.len() + (1 << 20), 0);
    base.set_len(content.len() as u64).expect("a length");
    bypasses(&lab, &cache, &content);
}

#[test]
fn a_base_that_shrank_is_read_itself_in_its_new_length() {
    let lab = Lab::new();
    let (cache, base) = warm(&lab);
    let content = &cache.base.content[..4 << 20];
    base.set_len(content.len() as u64).expect("a length");
    bypasses(&lab, &cache, content);
}

#[test]
fn another_file_under_the_base_s_name_is_read_itself() {
    let lab = Lab::new();
    let (cache, _base) = warm(&lab);
    let other = lab.path("other");
    std::fs::copy(&cache.base.file, &other).expect("a copy");
    std::fs::rename(&other, &cache.base.file).expect("in the base's place");
    bypasses(&lab, &cache, &cache.base.content);
}

#[test]
fn a_base_behind_a_protocol_that_has_another_size_is_read_itself() {
    let lab = Lab::new();
    let base = lab.base_of(crate::lab::content(8 << 20), "raw", crate::lab::Over::Nbd);
    let cache = lab.cache(&base, "");
    let other = crate::lab::content(9 << 20);
    let larger = lab.base_of(other, "raw", crate::lab::Over::File);
    let elsewhere = format!("backing.driver=raw,backing.file.filename={}", larger.name);
    let server = lab.serve_options(&format!("{},{elsewhere}", cache.options()));
    server.assert_serves(&larger.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("9437184 bytes"), "{said:?}");
}

#[test]
fn refuse_fails_the_open_of_a_changed_base_with_the_reason() {
    let lab = Lab::new();
    let (cache, base) = warm(&lab);
    base.set_modified(SystemTime::UNIX_EPOCH).expect("a time");
    let refused = refuses(&cache);
    assert!(refused.stderr.contains("the base was modified"), "{refused:?}");
    assert!(refused.stderr.contains("vmcache create --force"), "{refused:?}");
}

#[test]
fn refuse_fails_the_open_of_a_base_of_another_size() {
    let lab = Lab::new();
    let (cache, base) = warm(&lab);
    base.set_len(1 << 20).expect("a length");
    let refused = refuses(&cache);
    assert!(refused.stderr.contains("1048576 bytes"), "{refused:?}");
}

#[test]
fn a_base_that_is_as_it_was_is_not_refused() {
    let lab = Lab::new();
    let (cache, _base) = warm(&lab);
    let server = lab.serve_options(&format!("{},base-changed=refuse", cache.options()));
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().stderr, "");
}
