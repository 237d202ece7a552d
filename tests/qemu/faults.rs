//! What the image, the live file and their filesystem can do to a process that uses them: be cut
//! off, fail at any system call, be full or read-only. A guest's read never notices, one line says
//! why the cache is of no use, the image stays valid, and the next open finds it in order.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::signal::Signal;
use rand::Rng;

use crate::lab::{Base, Cache, Lab, Over, Server, anywhere, noise, sequential};
use crate::mounts::{fail_ext4, resize_tmpfs, set_read_only, with_ext4, with_tmpfs};
use crate::nbd::DEPTH;
use crate::process::{Tool, eventually};
use crate::settings::random;
use crate::system::{Machine, drive};

const CUT_OFF: &str = "its live file was cut off or can no longer be read; reading from the base";

fn cut_off(path: &Path, len: u64) {
    File::options().write(true).open(path).and_then(|file| file.set_len(len)).expect("a live file");
}

/// Fills a cache.
fn warm(lab: &Lab, cache: &Cache) {
    let server = lab.serve(cache);
    server.assert_serves(&cache.base.content);
    server.stop();
}

/// What has to hold after a fault is over: the image is in order, the next process serves the base
/// without a complaint and fills what is missing, and the one after that needs no base.
#[track_caller]
fn assert_recovered(lab: &Lab, cache: &Cache) {
    cache.assert_sound();
    let next = lab.serve(cache);
    next.assert_serves(&cache.base.content);
    assert_eq!(next.stop().stderr, "");
    let before = cache.stats();
    let last = lab.serve(cache);
    last.assert_serves(&cache.base.content);
    last.stop();
    let fetched = cache.stats().since(&before, "base-bytes");
    assert!(fetched <= 64 << 10, "{fetched} bytes from the base of a warm cache");
    cache.assert_sound();
}

fn a_warm_live_file_is_cut_to(len: u64) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    warm(&lab, &cache);
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), len);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_warm_cache_whose_live_file_is_cut_to_nothing_reads_from_the_base() {
    a_warm_live_file_is_cut_to(0);
}

#[test]
fn a_warm_cache_whose_live_file_is_cut_to_8_kib_reads_from_the_base() {
    a_warm_live_file_is_cut_to(8 << 10);
}

#[test]
fn a_warm_cache_whose_live_file_loses_its_map_reads_from_the_base() {
    // After the fixed parts: free list and slots stay, some groups of clusters go.
    a_warm_live_file_is_cut_to(312 << 10);
}

#[test]
fn a_live_file_cut_off_at_any_moment_of_filling_costs_one_line() {
    let lab = Lab::new();
    let base = lab.base();
    let mut random = random("cuts");
    for round in 0..12 {
        let cache = lab.cache(&base, ["", "quota=14M"][round % 2]);
        let server = lab.serve(&cache);
        let mut client = server.connect();
        let mut plan =
            anywhere(crate::settings::random(&format!("cut {round}")), base.content.len());
        for (offset, len) in plan.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        let reads = random.random_range(0..80);
        client.read_and_compare(&base.content, plan.by_ref().take(reads)).expect("reads");
        for (offset, len) in plan.by_ref().take(DEPTH) {
            client.send(offset, len).expect("a request");
        }
        thread::sleep(Duration::from_micros(random.random_range(0..4000)));
        cut_off(&cache.live(), [0, 8 << 10, 312 << 10][round % 3]);
        client.read_and_compare(&base.content, plan.take(40)).expect("reads");
        server.assert_serves(&base.content);
        let said = server.stop();
        // A quota that was reached before had its own line.
        let mut lines = said.warnings();
        lines.retain(|line| !line.contains("quota"));
        assert_eq!(lines.len(), 1, "round {round}: {said:?}");
        assert!(lines[0].ends_with(CUT_OFF), "{said:?}");
        cache.assert_sound();
        let next = lab.serve(&cache);
        next.assert_serves(&base.content);
        next.stop();
        cache.assert_sound();
    }
}

#[test]
fn everybody_on_a_live_file_that_is_cut_off_goes_on_and_newcomers_pass_through() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let servers = [(); 3].map(|()| lab.serve(&cache));
    let half = sequential(cache.base.content.len() / 2, 1 << 20);
    servers[0].connect().read_and_compare(&cache.base.content, half).expect("reads");
    cut_off(&cache.live(), 0);
    let newcomer = lab.serve(&cache);
    newcomer.assert_serves(&cache.base.content);
    for server in servers {
        server.assert_serves(&cache.base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    }
    let said = newcomer.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("deleted or replaced"), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_live_file_cut_off_while_nobody_reads_is_noticed_by_the_end_at_the_latest() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), 0);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_hole_in_a_live_file_costs_no_read_and_no_damage() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    let half = sequential(cache.base.content.len() / 2, 1 << 20);
    server.connect().read_and_compare(&cache.base.content, half).expect("reads");
    let live = File::options().write(true).open(cache.live()).expect("a live file");
    let len = live.metadata().expect("its length").len();
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&live, how, 0, len as i64).expect("a hole");
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert!(said.warnings().len() <= 1, "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_live_file_that_no_longer_knows_what_the_image_holds_is_made_anew() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(16 << 20), "raw", Over::File), "");
    let first = lab.serve(&cache);
    let (start, end) = ([(0, 8 << 20)], [(8 << 20, 8 << 20)]);
    first.connect().read_and_compare(&cache.base.content, end).expect("a read");
    first.stop();
    // What says that it belongs to the image stays; its length is right again.
    let len = fs::metadata(cache.live()).expect("a live file").len();
    cut_off(&cache.live(), 8 << 10);
    cut_off(&cache.live(), len);
    let next = lab.serve(&cache);
    next.connect().read_and_compare(&cache.base.content, start).expect("a read");
    assert_eq!(next.stop().stderr, "");
    assert_eq!(cache.info_number("cached-bytes"), 16 << 20);
    assert_recovered(&lab, &cache);
}

fn a_machine_survives_the_loss_of_its_live_file(iothread: Option<&str>) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let content = &cache.base.content;
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    let mut client = machine.serve(&lab.fresh("nbd"), iothread);
    client.read_and_compare(content, sequential(content.len() / 2, 1 << 20)).expect("reads");
    cut_off(&cache.live(), 0);
    client.read_and_compare(content, sequential(content.len(), 1 << 20)).expect("reads");
    drop(client);
    let said = machine.quit();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(CUT_OFF), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_machine_survives_the_loss_of_its_live_file_in_its_main_thread() {
    a_machine_survives_the_loss_of_its_live_file(None);
}

#[test]
fn a_machine_survives_the_loss_of_its_live_file_in_an_iothread() {
    a_machine_survives_the_loss_of_its_live_file(Some("t0"));
}

#[test]
fn one_lost_live_file_leaves_the_other_drives_of_a_machine_alone() {
    let lab = Lab::new();
    let base = lab.base_of(noise(8 << 20), "raw", Over::File);
    let caches = [lab.cache(&base, ""), lab.cache(&base, "")];
    let mut machine = Machine::start(&[drive("d0", &caches[0]), drive("d1", &caches[1])]);
    cut_off(&caches[0].live(), 0);
    for id in ["d0", "d1", "d0", "d1"] {
        machine.monitor(&format!("qemu-io {id} \"read -q 0 8M\""));
    }
    let said = machine.quit();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains(&caches[0].path.display().to_string()), "{said:?}");
    assert_eq!(caches[1].info_number("cached-bytes"), 8 << 20);
    assert_recovered(&lab, &caches[0]);
}

#[test]
fn a_signal_that_somebody_sends_ends_a_machine_as_without_the_library() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let mut machine = Machine::start(&[drive("d0", &cache)]);
    machine.monitor("qemu-io d0 \"read -q 0 8M\"");
    let child = machine.process();
    child.signal(Signal::SIGBUS);
    assert_eq!(child.wait().status.signal(), Some(Signal::SIGBUS as i32));
    cache.assert_valid();
    assert_recovered(&lab, &cache);
}

#[test]
fn a_signal_that_somebody_sends_to_a_tool_is_ignored_as_without_the_library() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let server = lab.serve(&cache);
    for _ in 0..3 {
        server.assert_serves(&cache.base.content);
        server.signal(Signal::SIGBUS);
    }
    server.assert_serves(&cache.base.content);
    cut_off(&cache.live(), 0);
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().warnings().len(), 1);
    assert_recovered(&lab, &cache);
}

#[test]
fn an_image_that_is_cut_off_while_in_use_costs_one_line_and_is_healed_by_reading() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    warm(&lab, &cache);
    let server = lab.serve(&cache);
    cut_off(&cache.path, cache.base.content.len() as u64 / 2);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("is not what was stored"), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn an_image_that_is_cut_off_after_it_was_read_costs_one_line_and_no_read() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    warm(&lab, &cache);
    let server = lab.serve(&cache);
    server.assert_serves(&cache.base.content);
    cut_off(&cache.path, cache.base.content.len() as u64 / 2);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("the image file has become shorter"), "{said:?}");

    let next = lab.serve(&cache);
    next.assert_serves(&cache.base.content);
    next.stop();
    assert_recovered(&lab, &cache);
}

#[test]
fn a_hit_of_which_the_page_cache_has_a_part_is_read_whole() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base_of(noise(8 << 20), "raw", Over::File), "");
    warm(&lab, &cache);
    let server = lab.serve(&cache);
    let before = cache.stats();
    let image = File::open(&cache.path).expect("the image");
    let len = image.metadata().expect("its length").len() as i64;
    for at in (0..len).step_by(96 << 10) {
        let how = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        posix_fadvise(&image, at, 40 << 10, how).expect("advice");
    }
    server.assert_serves(&cache.base.content);
    assert_eq!(server.stop().stderr, "");
    assert_eq!(cache.stats().since(&before, "hit-bytes"), 8 << 20);
}

fn with_a_file_size_limit(bytes: u64, line: &str) {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let limited = Tool::driver("qemu-nbd").under(["prlimit", &format!("--fsize={bytes}")]);
    let server = Server::start(&lab, limited, &["-r", "--image-opts", &cache.options()]);
    server.assert_serves(&cache.base.content);
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("File too large") && said.stderr.contains(line), "{said:?}");
    assert_recovered(&lab, &cache);
}

#[test]
fn a_file_size_limit_below_the_image_costs_one_line_and_no_read() {
    with_a_file_size_limit(4 << 20, "what cannot be stored is read from the base");
}

#[test]
fn a_file_size_limit_below_the_image_s_tables_costs_one_line_and_no_read() {
    with_a_file_size_limit(512 << 10, "what cannot be stored is read from the base");
}

#[test]
fn a_file_size_limit_below_the_live_file_costs_one_line_and_no_read() {
    with_a_file_size_limit(64 << 10, "could not set up the live file");
}

#[test]
fn a_live_file_that_cannot_be_mapped_costs_one_line_and_no_read() {
    let lab = Lab::new();
    let file = lab.path("huge.raw");
    let disk = File::create(&file).expect("a base");
    disk.set_len(1 << 40).expect("a base in holes");
    let start = noise(1 << 20);
    disk.write_all_at(&start, 0).expect("its start");
    let base = Base::at(file.display().to_string(), "raw", start, file);
    // 10 GiB of live file, in holes.
    let cache = lab.cache(&base, "cluster_size=16K");
    let limited = Tool::driver("qemu-nbd").under(["prlimit", "--as=6000000000"]);
    let server = Server::start(&lab, limited, &["-r", "--image-opts", &cache.options()]);
    let all = || sequential(base.content.len(), 64 << 10);
    server.connect().read_and_compare(&base.content, all()).expect("reads");
    let said = server.stop();
    assert_eq!(said.warnings().len(), 1, "{said:?}");
    assert!(said.stderr.contains("Cannot allocate memory"), "{said:?}");

    let next = lab.serve(&cache);
    next.connect().read_and_compare(&base.content, all()).expect("reads");
    assert_eq!(next.stop().stderr, "");
    assert_eq!(cache.info_number("cached-bytes"), 1 << 20);
}

#[test]
fn a_full_filesystem_that_grows_is_used_again_after_one_line() {
    let lab = Lab::new();
    let base = lab.base();
    let small = lab.fresh("small");
    fs::create_dir(&small).expect("a directory");
    with_tmpfs(&small, 8 << 20, || {
        let cache = lab.cache_at(small.join("cache.qcow2"), &base, "");
        let server = lab.serve(&cache);
        server.assert_serves(&base.content);
        // A second failure of the same episode.
        thread::sleep(Duration::from_millis(1100));
        server.assert_serves(&base.content);
        resize_tmpfs(&small, 64 << 20);
        eventually("the cache takes the rest", || {
            server.assert_serves(&base.content);
            let known = cache.info_number("cached-bytes") + cache.info_number("zero-bytes");
            known >= base.content.len() as u64
        });
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("No space left on device"), "{said:?}");
        assert_recovered(&lab, &cache);
    });
}

#[test]
fn a_filesystem_that_turns_read_only_while_in_use_costs_one_line_and_no_read() {
    let lab = Lab::new();
    let base = lab.base();
    let failing = lab.fresh("failing");
    fs::create_dir(&failing).expect("a directory");
    with_ext4(&failing, 96 << 20, || {
        let cache = lab.cache_at(failing.join("cache.qcow2"), &base, "");
        let server = lab.serve(&cache);
        let half = sequential(base.content.len() / 2, 1 << 20);
        server.connect().read_and_compare(&base.content, half).expect("reads");
        fail_ext4(&failing);
        server.assert_serves(&base.content);
        server.assert_serves(&base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        cache.assert_no_errors();

        let next = lab.serve(&cache);
        next.assert_serves(&base.content);
        let said = next.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("Read-only file system"), "{said:?}");
    });
}

#[test]
fn a_cache_on_a_read_only_filesystem_serves_what_it_has_until_it_is_writable_again() {
    let lab = Lab::new();
    let base = lab.base();
    let mounted = lab.fresh("mounted");
    fs::create_dir(&mounted).expect("a directory");
    with_tmpfs(&mounted, 64 << 20, || {
        let cache = lab.cache_at(mounted.join("cache.qcow2"), &base, "");
        let first = lab.serve(&cache);
        let half = sequential(base.content.len() / 2, 1 << 20);
        first.connect().read_and_compare(&base.content, half).expect("reads");
        first.stop();
        set_read_only(&mounted, true);
        let server = lab.serve(&cache);
        server.assert_serves(&base.content);
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("using what is cached without adding to it"), "{said:?}");
        set_read_only(&mounted, false);
        assert_recovered(&lab, &cache);
    });
}

#[test]
fn a_failed_sync_gives_the_image_up_for_everybody_until_it_is_opened_anew() {
    let lab = Lab::new();
    let cache = lab.cache(&lab.base(), "");
    let content = &cache.base.content;
    let neighbour = lab.serve(&cache);
    // It must not be faster with the checkpoint.
    neighbour.signal(Signal::SIGSTOP);
    // Nothing else in it syncs.
    let fault = ["strace", "-f", "-qq", "-e", "inject=fdatasync:error=EIO", "-o"];
    let failing = Tool::driver("qemu-io")
        .args(["-r", "--image-opts", &cache.options(), "-c", "read 0 8M"])
        .under(fault.map(PathBuf::from).into_iter().chain([lab.fresh("trace")]))
        .run()
        .success();
    assert_eq!(failing.warnings().len(), 1, "{failing:?}");
    assert!(failing.stderr.contains("could not sync"), "{failing:?}");

    neighbour.signal(Signal::SIGCONT);
    neighbour.assert_serves(content);
    let newcomer = lab.serve(&cache);
    newcomer.assert_serves(content);
    for server in [neighbour, newcomer] {
        let said = server.stop();
        assert_eq!(said.warnings().len(), 1, "{said:?}");
        assert!(said.stderr.contains("another process found it unreliable"), "{said:?}");
    }
    assert_recovered(&lab, &cache);
}

/// System calls that can fail, and how. They are found by the names of the files, which strace does
/// not know inside another root directory: this is for the series that is installed.
mod injected {
    use std::collections::BTreeMap;
    use std::fs;
    use std::time::{Duration, Instant};

    use crate::lab::{Cache, Lab, Over};
    use crate::process::{Output, Tool};
    use crate::settings::number;

    /// Bytes of the base that are alike.
    const BLOCK: usize = 256 << 10;
    const BLOCKS: usize = 16;
    /// What a read may take with a fault in it: more than the deadlines of its waits, and no hang.
    const NO_HANG: Duration = Duration::from_secs(20);

    /// Calls that only the driver makes, the live file under construction among their files.
    const OURS_ALONE: [&str; 8] = [
        "ftruncate",
        "fallocate",
        "fchown",
        "fchmod",
        "rename",
        "fsetxattr",
        "fgetxattr",
        "fstatfs",
    ];

    fn pattern(block: usize) -> usize {
        [block + 1, 0][usize::from(block % 5 == 3)]
    }

    /// An empty cache of a base that qemu-io's `read -P` knows.
    fn patterned(lab: &Lab) -> Cache {
        let content = (0..BLOCKS).flat_map(|block| [pattern(block) as u8; BLOCK]).collect();
        lab.cache(&lab.base_of(content, "raw", Over::File), "")
    }

    /// qemu-io: reads everything three times, with time to store in between.
    fn reads(cache: &Cache) -> Tool {
        let pass = |_| {
            (0..BLOCKS).map(|block| format!("read -P {} {} {BLOCK}", pattern(block), block * BLOCK))
        };
        let commands = ["sleep 30".to_owned()];
        let commands = (0..3).flat_map(|number| pass(number).chain(commands.clone()));
        Tool::driver("qemu-io")
            .args(["-r", "--image-opts", &cache.options()])
            .args(commands.flat_map(|command| ["-c".to_owned(), command]))
    }

    /// What happened in a run under strace.
    struct Run {
        said: Output,
        trace: String,
        took: Duration,
    }

    /// Runs under strace, which shows a call and what an open reads, and injects a fault if any.
    fn traced(lab: &Lab, cache: &Cache, call: &str, fault: Option<&str>) -> Run {
        let trace = lab.fresh("trace");
        let mut words = vec!["strace".into(), "-f".into(), "-qq".into(), "-o".into()];
        words.push(trace.clone());
        let files = [&cache.path, &cache.live()].map(Clone::clone);
        let files = files.into_iter().filter(|_| !OURS_ALONE.contains(&call));
        words.extend(files.flat_map(|path| ["-P".into(), path]));
        words.extend(["-e".into(), format!("trace={call},openat,pread64").into()]);
        words.extend(fault.into_iter().flat_map(|fault| ["-e".into(), fault.into()]));
        let started = Instant::now();
        let said = reads(cache).under(words).run();
        let trace = fs::read_to_string(trace).expect("a trace");
        Run { said, trace, took: started.elapsed() }
    }

    /// How often a run makes a call in one thread at the most.
    fn occurrences(trace: &str, call: &str) -> usize {
        let mut by_thread = BTreeMap::<&str, usize>::new();
        let calls = trace.lines().filter_map(|line| {
            let (thread, rest) = line.split_once(' ')?;
            rest.trim_start().starts_with(&format!("{call}(")).then_some(thread)
        });
        calls.for_each(|thread| *by_thread.entry(thread).or_default() += 1);
        by_thread.into_values().max().unwrap_or(0)
    }

    /// Which of some occurrences are tried: all of them, or those where something begins or ends.
    fn chosen(occurrences: usize) -> Vec<usize> {
        let all = number("VMCACHE_TEST_FULL") == Some(1);
        let keep = |at: &usize| {
            all || occurrences <= 4 || [1, 2, occurrences.div_ceil(2), occurrences].contains(at)
        };
        (1..=occurrences).filter(keep).collect()
    }

    /// Whether a run could not even begin: a fault where QEMU opens the file for itself, or one that
    /// stays and keeps the driver from reading what the image is.
    fn is_refused_open(run: &Run, fault: &str) -> bool {
        let theirs = run.trace.split("O_RDWR|O_NONBLOCK").next().unwrap_or_default();
        let has_header = run.trace.contains("\"QFI\\373");
        let refusals =
            run.said.stderr.lines().filter(|line| line.starts_with("qemu-io: can't open"));
        run.said.code() == Some(1)
            && run.said.stdout.is_empty()
            && refusals.count() == 1
            && (theirs.contains("(INJECTED)") || fault.ends_with('+') && !has_header)
    }

    /// What is wrong with a run, if anything.
    fn complaint(run: &Run, fault: &str) -> Option<&'static str> {
        // A second line is about another fault, with another effect. To be interrupted is none; only
        // a lock that does not wait never is.
        let is_fault = !fault.contains("EINTR") || fault.contains("fcntl");
        let most = if is_fault { 2 } else { 0 };
        let lines = run.trace.matches("(INJECTED)").count().min(most);
        let is_wrong = [
            (run.took > NO_HANG, "it took too long"),
            (!run.said.status.success() && !is_refused_open(run, fault), "it failed"),
            (run.said.stdout.contains("verification failed"), "wrong bytes"),
            (run.said.stdout.contains("failed"), "a read failed"),
            (run.said.warnings().len() > lines, "more lines than faults"),
        ];
        is_wrong.into_iter().find_map(|(is_so, what)| is_so.then_some(what))
    }

    /// The faults to try: an error at an occurrence of a call alone, and from there on.
    fn faults(call: &str, error: &str, seen: usize) -> Vec<String> {
        // No call is interrupted for ever.
        let from_on: &[&str] = if error == "EINTR" { &[""] } else { &["", "+"] };
        let fault = |at, more| format!("inject={call}:error={error}:when={at}{more}");
        chosen(seen)
            .into_iter()
            .flat_map(|at| from_on.iter().map(move |more| fault(at, more)))
            .collect()
    }

    /// What came of a fault.
    struct Tried {
        /// It came about: which thread makes how many calls is not always the same.
        injected: bool,
        refused: bool,
        wrong: Option<String>,
    }

    /// Tries a fault, and what the image is good for afterwards.
    fn try_fault(call: &str, fault: &str, prepare: fn(&Lab) -> Cache) -> Tried {
        let lab = Lab::new();
        let cache = prepare(&lab);
        let run = traced(&lab, &cache, call, Some(fault));
        cache.assert_no_errors();
        let next = reads(&cache).run();
        let next_is_right =
            next.status.success() && next.stderr.is_empty() && !next.stdout.contains("failed");
        cache.assert_sound();
        let now = complaint(&run, fault).map(|what| format!("{fault}: {what}\n{:?}", run.said));
        let later = (!next_is_right).then(|| format!("after {fault}: {next:?}"));
        Tried {
            injected: run.trace.contains("(INJECTED)"),
            refused: is_refused_open(&run, fault),
            wrong: now.or(later),
        }
    }

    /// Injects faults into a call, at each occurrence and from it on, each time into a cache that
    /// `prepare` has made.
    fn every_fault_of(call: &str, errors: &[&str], prepare: fn(&Lab) -> Cache) {
        let lab = Lab::new();
        let seen = occurrences(&traced(&lab, &prepare(&lab), call, None).trace, call);
        let faults = errors.iter().flat_map(|error| faults(call, error, seen));
        let tried: Vec<Tried> = faults.map(|fault| try_fault(call, &fault, prepare)).collect();
        let injected = tried.iter().filter(|tried| tried.injected).count();
        let refused = tried.iter().filter(|tried| tried.refused).count();
        println!("{call}: {injected} faults, {refused} of which kept the image from being opened");
        let wrong: Vec<&str> = tried.iter().filter_map(|tried| tried.wrong.as_deref()).collect();
        assert!(wrong.is_empty(), "{} of {injected}:\n{}", wrong.len(), wrong.join("\n"));
        assert!(injected > tried.len() / 2, "{injected} of {} faults came about", tried.len());
    }

    #[test]
    fn no_fault_in_opening_reaches_a_guest() {
        every_fault_of(
            "openat",
            &["EACCES", "EMFILE", "EIO", "ENOMEM", "EROFS", "EINTR"],
            patterned,
        );
    }

    #[test]
    fn no_fault_in_examining_by_name_reaches_a_guest() {
        every_fault_of("newfstatat", &["EIO"], patterned);
    }

    #[test]
    fn no_fault_in_examining_reaches_a_guest() {
        every_fault_of("statx", &["EIO", "ENOMEM"], patterned);
    }

    #[test]
    fn no_fault_in_asking_for_the_filesystem_reaches_a_guest() {
        every_fault_of("fstatfs", &["EIO"], patterned);
    }

    #[test]
    fn no_fault_in_locking_reaches_a_guest() {
        every_fault_of("fcntl", &["ENOLCK", "EINTR", "EIO"], patterned);
    }

    #[test]
    fn no_fault_in_reading_tables_reaches_a_guest() {
        every_fault_of("pread64", &["EIO", "EINTR", "ENOMEM"], patterned);
    }

    #[test]
    fn no_fault_in_reading_cached_data_reaches_a_guest() {
        every_fault_of("preadv2", &["EIO", "EINTR", "ENOMEM", "EAGAIN", "EOPNOTSUPP"], patterned);
    }

    #[test]
    fn no_fault_in_writing_reaches_a_guest() {
        every_fault_of("pwrite64", &["EIO", "ENOSPC", "EDQUOT", "EROFS", "EINTR"], patterned);
    }

    #[test]
    fn no_fault_in_syncing_reaches_a_guest() {
        every_fault_of("fdatasync", &["EIO", "ENOSPC", "EDQUOT", "EINTR"], patterned);
    }

    #[test]
    fn no_fault_in_allocating_reaches_a_guest() {
        every_fault_of("fallocate", &["EIO", "ENOSPC", "EDQUOT", "EOPNOTSUPP", "EINTR"], patterned);
    }

    #[test]
    fn no_fault_in_setting_lengths_reaches_a_guest() {
        every_fault_of("ftruncate", &["EIO", "ENOSPC", "EFBIG", "EINTR"], patterned);
    }

    #[test]
    fn no_fault_in_looking_for_holes_reaches_a_guest() {
        every_fault_of("lseek", &["EIO", "EINVAL"], patterned);
    }

    #[test]
    fn no_fault_in_noting_the_live_file_reaches_a_guest() {
        every_fault_of("fsetxattr", &["EIO", "EOPNOTSUPP", "ENOSPC"], patterned);
    }

    #[test]
    fn no_fault_in_looking_up_the_live_file_reaches_a_guest() {
        every_fault_of("fgetxattr", &["EIO", "EOPNOTSUPP"], patterned);
    }

    #[test]
    fn no_fault_in_giving_the_live_file_its_owner_reaches_a_guest() {
        every_fault_of("fchown", &["EPERM", "EIO"], patterned);
    }

    #[test]
    fn no_fault_in_giving_the_live_file_its_mode_reaches_a_guest() {
        every_fault_of("fchmod", &["EPERM", "EIO"], patterned);
    }

    #[test]
    fn no_fault_in_naming_the_live_file_reaches_a_guest() {
        every_fault_of("rename", &["EIO", "ENOSPC", "EROFS", "EACCES"], patterned);
    }

    /// The same cache, half filled, with a live file.
    fn half_filled(lab: &Lab) -> Cache {
        let cache = patterned(lab);
        let half = format!("read -q 0 {}", BLOCKS / 2 * BLOCK);
        Tool::driver("qemu-io")
            .args(["-r", "--image-opts", &cache.options(), "-c", &half])
            .run()
            .success();
        cache
    }

    #[test]
    fn no_memory_to_map_the_live_file_reaches_no_guest() {
        every_fault_of("mmap", &["ENOMEM", "EAGAIN"], half_filled);
    }

    #[test]
    fn no_fault_in_opening_with_a_live_file_reaches_a_guest() {
        every_fault_of("openat", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_examining_with_a_live_file_reaches_a_guest() {
        every_fault_of("statx", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_locking_with_a_live_file_reaches_a_guest() {
        every_fault_of("fcntl", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_reading_tables_with_a_live_file_reaches_a_guest() {
        every_fault_of("pread64", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_writing_with_a_live_file_reaches_a_guest() {
        every_fault_of("pwrite64", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_allocating_with_a_live_file_reaches_a_guest() {
        every_fault_of("fallocate", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_syncing_with_a_live_file_reaches_a_guest() {
        every_fault_of("fdatasync", &["EIO"], half_filled);
    }

    #[test]
    fn no_fault_in_reading_cached_data_with_a_live_file_reaches_a_guest() {
        every_fault_of("preadv2", &["EIO"], half_filled);
    }
}
