//! A base that is not what the cache was made from, that becomes so in use, or that goes away: the
//! cache steps aside, or refuses if told to, and holds nothing but what it was made from.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::thread;
use std::time::{Duration, SystemTime};

use crate::lab::{Base, Cache, Lab, Over, Server, anywhere_up_to, noise, sequential};
use crate::nbd::{Client, DEPTH};
use crate::process::{Child, Output, Tool, eventually};
use crate::settings::{random, text};

/// Bytes of the bases that are rewritten here, and how much of them is cached.
const SIZE: usize = (8 << 20) + 3 * 512;
const HALF: usize = 4 << 20;

/// How long after a change nothing of what was before may be read any more.
const NOTICED: Duration = Duration::from_secs(10);

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

/// What holds a base on the storage node, to be changed there and put back.
struct Stored {
    path: PathBuf,
    bytes: Vec<u8>,
    modified: SystemTime,
}

impl Stored {
    fn of(base: &Base) -> Self {
        let exported = text("VMCACHE_TEST_NFS_DIRECTORY").filter(|_| base.name.starts_with("nfs"));
        let path = match exported {
            Some(directory) => {
                Path::new(&directory).join(base.name.rsplit('/').next().expect("a name"))
            }
            None => base.file.clone(),
        };
        let modified = fs::metadata(&path).and_then(|meta| meta.modified()).expect("a base");
        Stored { bytes: fs::read(&path).expect("a base"), path, modified }
    }

    fn open(&self) -> File {
        File::options().write(true).open(&self.path).expect("the base")
    }

    /// Gives it another content in its format and sets its time back, so that nothing but the
    /// content tells.
    fn rewrite(&self, lab: &Lab, content: &[u8], format: &'static str) {
        let other = lab.base_of(content.to_vec(), format, Over::File);
        self.write(&fs::read(other.file).expect("another base"));
    }

    fn restore(&self) {
        self.write(&self.bytes);
    }

    fn write(&self, bytes: &[u8]) {
        let file = self.open();
        file.write_all_at(bytes, 0).expect("a rewritten base");
        file.set_len(bytes.len() as u64).expect("a length");
        file.set_modified(self.modified).expect("a time");
    }
}

/// The content turned over: different at each byte.
fn other(content: &[u8]) -> Vec<u8> {
    content.iter().map(|byte| !*byte).collect()
}

/// A cache that holds the first half of a base without zeros.
fn half_warm(lab: &Lab, format: &'static str, over: Over) -> (Cache, Stored) {
    let base = lab.base_of(noise(SIZE), format, over);
    let cache = lab.cache(&base, "");
    let server = lab.serve(&cache);
    warm_half(&mut server.connect(), &base.content);
    server.stop();
    (cache, Stored::of(&base))
}

fn warm_half(client: &mut Client, content: &[u8]) {
    client.read_and_compare(content, sequential(HALF, 256 << 10)).expect("reads");
}

fn is_read_itself(format: &'static str, over: Over) {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, format, over);
    let image = fs::read(&cache.path).expect("the cache");
    let content = other(&cache.base.content);
    stored.rewrite(&lab, &content, format);
    bypasses(&lab, &cache, &content);
    let now = fs::read(&cache.path).expect("the cache");
    assert!(now[512..] == image[512..], "more of the image than its header has changed");
}

fn is_refused(format: &'static str, over: Over) {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, format, over);
    stored.rewrite(&lab, &other(&cache.base.content), format);
    let refused = refuses(&cache);
    assert!(refused.stderr.contains("vmcache create --force"), "{refused:?}");
    assert_eq!(refused.warnings().len(), 0, "{refused:?}");
}

fn is_stale_until_it_is_right_again(format: &'static str, over: Over) {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, format, over);
    let content = other(&cache.base.content);
    stored.rewrite(&lab, &content, format);
    bypasses(&lab, &cache, &content);
    assert_eq!(cache.info("state"), "stale");
    let checked = Tool::vmcache().arg("check").arg(&cache.path).run();
    assert_eq!(checked.code(), Some(2), "{checked:?}");
    assert!(checked.stdout.contains("The image is stale"), "{checked:?}");

    stored.restore();
    let server = lab.serve(&cache);
    let before = cache.stats();
    warm_half(&mut server.connect(), &cache.base.content);
    assert_eq!(cache.stats().since(&before, "base-reads"), 0);
    assert_eq!(server.stop().stderr, "");
    assert_eq!(cache.info("state"), "filling");
    Tool::vmcache().arg("check").arg(&cache.path).run().success();
    cache.assert_sound();
}

fn is_cached_anew_by_force(format: &'static str, over: Over) {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, format, over);
    let content = other(&cache.base.content);
    stored.rewrite(&lab, &content, format);
    Tool::vmcache()
        .args(["create", "-q", "--force", "-b", &cache.base.name, "-F", format])
        .arg(&cache.path)
        .run()
        .success();
    let server = lab.serve(&cache);
    server.assert_serves(&content);
    server.assert_serves(&content);
    assert_eq!(server.stop().stderr, "");
    assert_eq!(cache.info_number("cached-bytes"), SIZE as u64);
    cache.assert_sound();
}

macro_rules! rewritten {
    ($($name:ident: $what:ident, $format:literal, $over:ident;)*) => {$(
        #[test]
        fn $name() {
            $what($format, Over::$over);
        }
    )*};
}

rewritten! {
    a_rewritten_raw_file_is_read_itself: is_read_itself, "raw", File;
    a_rewritten_qcow2_file_is_read_itself: is_read_itself, "qcow2", File;
    a_rewritten_base_over_nfs_is_read_itself: is_read_itself, "raw", Nfs;
    a_rewritten_base_over_nbd_is_read_itself: is_read_itself, "raw", Nbd;
    a_rewritten_raw_file_is_refused: is_refused, "raw", File;
    a_rewritten_qcow2_file_is_refused: is_refused, "qcow2", File;
    a_rewritten_base_over_nfs_is_refused: is_refused, "raw", Nfs;
    a_rewritten_base_over_nbd_is_refused: is_refused, "raw", Nbd;
    a_rewritten_raw_file_is_stale: is_stale_until_it_is_right_again, "raw", File;
    a_rewritten_qcow2_file_is_stale: is_stale_until_it_is_right_again, "qcow2", File;
    a_rewritten_base_over_nfs_is_stale: is_stale_until_it_is_right_again, "raw", Nfs;
    a_rewritten_base_over_nbd_is_stale: is_stale_until_it_is_right_again, "raw", Nbd;
    a_rewritten_raw_file_is_cached_anew_by_force: is_cached_anew_by_force, "raw", File;
    a_rewritten_qcow2_file_is_cached_anew_by_force: is_cached_anew_by_force, "qcow2", File;
    a_rewritten_base_over_nfs_is_cached_anew_by_force: is_cached_anew_by_force, "raw", Nfs;
    a_rewritten_base_over_nbd_is_cached_anew_by_force: is_cached_anew_by_force, "raw", Nbd;
}

/// What must hold after the base was rewritten in use, and nobody uses the cache any more.
fn assert_holds_the_old_base_alone(lab: &Lab, cache: &Cache, stored: &Stored, content: &[u8]) {
    bypasses(lab, cache, content);
    stored.restore();
    cache.assert_sound();
    let server = lab.serve(cache);
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().stderr, "");
    cache.assert_sound();
}

#[test]
fn a_base_that_is_rewritten_while_it_is_read_shows_old_and_new_bytes_and_then_new_ones_alone() {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, "raw", Over::File);
    let old = &cache.base.content;
    let server = lab.serve(&cache);
    let mut client = server.connect();
    let new = other(old);
    let file = stored.open();

    let mut reads = anywhere_up_to(64 << 10, random("rewritten"), SIZE);
    for at in (0..SIZE).step_by(64 << 10) {
        for (offset, len) in reads.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        file.write_all_at(&new[at..SIZE.min(at + (64 << 10))], at as u64).expect("a write");
        for _ in 0..DEPTH {
            let (offset, data) = client.receive().expect("an answer");
            let old_and_new = old.iter().zip(&new).skip(offset as usize);
            let strange =
                data.iter().zip(old_and_new).position(|(got, (old, new))| got != old && got != new);
            assert_eq!(strange, None, "neither old nor new after {offset}");
        }
    }
    thread::sleep(NOTICED);
    server.assert_serves(&new);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("the base was modified in use"), "{said:?}");
    assert_holds_the_old_base_alone(&lab, &cache, &stored, &new);
}

#[test]
fn a_base_that_is_rewritten_under_a_warm_cache_is_read_itself_by_all_its_users() {
    for format in ["raw", "qcow2"] {
        let lab = Lab::new();
        let base = lab.base_of(noise(SIZE), format, Over::File);
        let (cache, stored) = (lab.cache(&base, ""), Stored::of(&base));
        let server = lab.serve(&cache);
        server.assert_serves(&base.content);
        server.stop();
        let servers = [lab.serve(&cache), lab.serve(&cache)];
        servers.iter().for_each(|server| server.assert_serves(&base.content));
        let new = other(&base.content);
        let rewritten = lab.base_of(new.clone(), format, Over::File);
        let bytes = fs::read(&rewritten.file).expect("another base");
        // A qcow2 file that is open may not change but for its data: in the same place, here.
        assert_eq!(bytes.len(), stored.bytes.len());
        stored.open().write_all_at(&bytes, 0).expect("a rewritten base");
        thread::sleep(NOTICED);
        servers.iter().for_each(|server| server.assert_serves(&new));
        for server in servers {
            let said = server.stop();
            assert_eq!(said.warnings().len(), 1, "{said:?}");
            assert!(said.stderr.contains("the base was modified in use"), "{said:?}");
        }
        assert_holds_the_old_base_alone(&lab, &cache, &stored, &new);
    }
}

#[test]
fn a_base_that_is_cut_off_in_use_reads_as_it_does_without_a_cache() {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, "raw", Over::File);
    let name = cache.base.name.as_str();
    let plain = Server::start(&lab, Tool::stock("qemu-nbd"), &["-r", "-f", "raw", name]);
    let server = lab.serve(&cache);
    let mut client = server.connect();
    stored.open().set_len(1 << 20).expect("a length");
    let cut = read_all(&mut plain.connect());
    let upper = sequential(SIZE, 64 << 10).filter(|(at, _)| *at >= HALF as u64);
    client.read_and_compare(&cut, upper).expect("reads");
    thread::sleep(NOTICED);
    server.assert_serves(&cut);
    assert_eq!(server.stop().warnings().len(), 1);
    plain.stop();
    stored.restore();
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().stderr, "");
    cache.assert_sound();
}

fn read_all(client: &mut Client) -> Vec<u8> {
    let mut content = vec![0; client.size() as usize];
    for (offset, len) in sequential(content.len(), 64 << 10) {
        client.send(offset, len).expect("a request");
        let (at, data) = client.receive().expect("an answer");
        content[at as usize..][..data.len()].copy_from_slice(data);
    }
    content
}

#[test]
fn a_base_that_is_deleted_in_use_goes_on_being_cached() {
    let lab = Lab::new();
    let (cache, stored) = half_warm(&lab, "raw", Over::File);
    let server = lab.serve(&cache);
    fs::remove_file(&stored.path).expect("the base");
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().stderr, "");
    fs::write(&stored.path, &stored.bytes).expect("the base again");
    assert_eq!(cache.info_number("cached-bytes"), SIZE as u64);
    cache.assert_sound();
}

/// `qemu-io` that is asked one thing after the other.
struct Shell {
    _child: Child,
    input: ChildStdin,
    output: ChildStdout,
}

impl Shell {
    fn start(tool: Tool, args: &[&str]) -> Self {
        let (child, input, output) = tool.arg("-r").args(args).start_with_pipes();
        let mut shell = Shell { _child: child, input, output };
        shell.hear();
        shell
    }

    fn ask(&mut self, command: &str) -> String {
        self.say(command);
        self.hear()
    }

    fn say(&mut self, command: &str) {
        writeln!(self.input, "{command}").expect("qemu-io listens");
    }

    /// The first line of what it says before it asks for more.
    fn hear(&mut self) -> String {
        let mut said = Vec::new();
        while !said.ends_with(b"qemu-io> ") {
            let mut byte = [0];
            self.output.read_exact(&mut byte).expect("qemu-io answers");
            said.extend(byte);
        }
        String::from_utf8_lossy(&said).lines().next().unwrap_or_default().to_owned()
    }
}

/// An NBD server that can be ended and started again at the same address, with a base that has the
/// same byte everywhere.
struct Comeback {
    base: Base,
    file: PathBuf,
    socket: PathBuf,
    server: Child,
}

impl Comeback {
    fn new(lab: &Lab) -> Self {
        let (file, socket) = (lab.path("served.raw"), lab.path("comeback"));
        fs::write(&file, vec![0x5a; SIZE]).expect("a base");
        let url = format!("nbd+unix:///?socket={}", socket.display());
        let base = Base::at(url, "raw", vec![0x5a; SIZE], file.clone());
        let server = serve_at(&socket, &file);
        Comeback { base, file, socket, server }
    }

    fn end(&mut self) {
        self.server.kill();
        fs::remove_file(&self.socket).expect("a socket");
    }

    fn come_back(&mut self) {
        self.server = serve_at(&self.socket, &self.file);
    }
}

fn serve_at(socket: &Path, file: &Path) -> Child {
    let server = Tool::stock("qemu-nbd")
        .args(["-t", "-e", "64", "-r", "-f", "raw", "-k"])
        .args([socket, file])
        .start_in_background();
    eventually("qemu-nbd answers", || Client::connect(socket).is_ok());
    server
}

#[test]
fn a_server_that_is_gone_gives_the_error_it_gives_without_a_cache_and_no_error_is_cached() {
    let lab = Lab::new();
    let mut remote = Comeback::new(&lab);
    let cache = lab.cache(&remote.base, "");
    let mut plain = Shell::start(Tool::stock("qemu-io"), &["-f", "raw", &remote.base.name]);
    let mut cached = Shell::start(Tool::driver("qemu-io"), &["--image-opts", &cache.options()]);
    let ok = "read 65536/65536 bytes at offset 0";
    assert_eq!(cached.ask("read -P 0x5a 0 64k"), ok);
    remote.end();
    let failed = plain.ask("read -P 0x5a 64k 64k");
    assert!(failed.starts_with("read failed: "), "{failed}");
    assert_eq!(cached.ask("read -P 0x5a 64k 64k"), failed);
    assert_eq!(cached.ask("read -P 0x5a 0 64k"), ok);
    assert_eq!(cached.ask("read -P 0x5a 32k 64k"), failed);
    drop((plain, cached));
    remote.come_back();
    let server = lab.serve(&cache);
    server.assert_serves(&remote.base.content);
    assert_eq!(server.stop().stderr, "");
    cache.assert_sound();
}

#[test]
fn a_server_that_comes_back_is_read_again_by_the_same_process() {
    let lab = Lab::new();
    let mut remote = Comeback::new(&lab);
    let server = serde_json::json!({ "type": "unix", "path": remote.socket });
    let file = serde_json::json!({ "driver": "nbd", "server": server, "reconnect-delay": 60 });
    let patient = serde_json::json!({ "driver": "raw", "file": file });
    let content = remote.base.content.to_vec();
    let base = Base::at(format!("json:{patient}"), "raw", content, remote.file.clone());
    let cache = lab.cache(&base, "");
    let mut cached = Shell::start(Tool::driver("qemu-io"), &["--image-opts", &cache.options()]);
    cached.ask("read -P 0x5a 0 64k");
    remote.end();
    cached.say("read -P 0x5a 64k 64k");
    remote.come_back();
    assert_eq!(cached.hear(), "read 65536/65536 bytes at offset 65536");
    assert_eq!(cached.ask("read -P 0x5a 0 1M"), "read 1048576/1048576 bytes at offset 0");
    drop(cached);
    let server = lab.serve(&cache);
    server.assert_serves(&remote.base.content);
    assert_eq!(server.stop().stderr, "");
    cache.assert_sound();
}
