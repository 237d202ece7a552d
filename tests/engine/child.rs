//! Other processes on the same image: this test binary again, told by its environment what to do.
//! A child reads lines from its standard input and writes lines that begin with `@`.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child as Process, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vmcache::engine::{Base, Engine, Options, Reader};

use crate::fixture::{Fixture, KIB, file_base, qemu_img};

const ROLE: &str = "VMCACHE_TEST_ROLE";
const IMAGE: &str = "VMCACHE_TEST_IMAGE";
const BASE: &str = "VMCACHE_TEST_BASE";
const SEED: &str = "VMCACHE_TEST_SEED";

/// What a child does.
#[derive(Clone, Copy, Debug)]
pub enum Role {
    /// Reads random blocks, compares them, says `@read` after each; `@done` when it has all.
    Fill,
    /// Says `@open`, waits for a line, reads everything once, notes each read of the base in
    /// `reads.log` beside the image, closes and says `@done` with the bytes it dropped.
    ReadAll,
    /// Opens, reads a few random blocks and closes, for ever, with `@closed` after each round.
    OpenAndClose,
    /// Reads the first bytes, as many as the seed says, and says `@done` with the reads of the base.
    Serve,
    /// Reads everything through the image of the same name in the directory
    /// `small`, closes, has `qemu-img` look at it and says `@done sound`.
    FillSmall,
    /// Reads the first block of a base that never answers; says `@fetching` when it has begun.
    Stuck,
}

/// A running child; killed when it is dropped.
pub struct Child {
    process: Process,
    lines: io::Lines<BufReader<ChildStdout>>,
}

impl Child {
    pub fn spawn(role: Role, fixture: &Fixture, seed: u64) -> Self {
        let command = Command::new(env::current_exe().unwrap());
        Child::run(command, role, &fixture.image(), &fixture.base(), seed)
    }

    /// Starts a child in a mount namespace of its own after some commands of the shell, which find
    /// the image's directory in `$0`.
    pub fn spawn_after(setup: &str, role: Role, image: &Path, base: &Path, seed: u64) -> Self {
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "--mount", "sh", "-e", "-c"])
            .arg(format!("{setup}; exec \"$@\""))
            .arg(image.parent().unwrap())
            .arg(env::current_exe().unwrap());
        Child::run(command, role, image, base, seed)
    }

    /// Starts a child to which the image's directory is mounted read-only.
    pub fn spawn_read_only(role: Role, fixture: &Fixture, seed: u64) -> Self {
        let setup = "mount --bind \"$0\" \"$0\"; mount -o remount,ro,bind \"$0\"";
        Child::spawn_after(setup, role, &fixture.image(), &fixture.base(), seed)
    }

    fn run(mut command: Command, role: Role, image: &Path, base: &Path, seed: u64) -> Self {
        let mut process = command
            .args(["--exact", "child::main_of_a_child", "--ignored", "--nocapture"])
            .env(ROLE, format!("{role:?}"))
            .env(IMAGE, image)
            .env(BASE, base)
            .env(SEED, seed.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Child { process, lines }
    }

    /// The rest of the next line that begins with `word`.
    pub fn wait_for(&mut self, word: &str) -> String {
        self.lines
            .by_ref()
            .map(Result::unwrap)
            .find_map(|line| line.strip_prefix(word).map(|rest| rest.trim().to_owned()))
            .unwrap_or_else(|| panic!("the child ended without {word}"))
    }

    /// Lets a child go on that waits for it.
    pub fn go(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Kills the child (`SIGKILL`) and waits for its end.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
#[ignore = "the main function of child processes"]
fn main_of_a_child() {
    let path = |name| PathBuf::from(env::var_os(name).unwrap_or_default());
    let (image, base) = (path(IMAGE), path(BASE));
    let seed = env::var(SEED).map_or(0, |seed| seed.parse().unwrap());
    match env::var(ROLE).unwrap_or_default().as_str() {
        "Fill" => fill(&image, &base, seed),
        "ReadAll" => read_all(&image, &base, seed),
        "OpenAndClose" => open_and_close(&image, &base, seed),
        "Serve" => serve(&image, &base, seed),
        "FillSmall" => fill_small(&image, &base),
        "Stuck" => stuck(&image),
        // Somebody runs all ignored tests.
        _ => {}
    }
}

fn say(words: &str) {
    let mut out = io::stdout().lock();
    // The harness may have begun a line.
    out.write_all(format!("\n@{words}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn open(image: &Path) -> Arc<Engine> {
    Arc::new(Engine::open(image, &Options::default()).unwrap())
}

/// Reads blocks of 4 KiB in random order and compares each.
fn read_randomly<B: Base>(reader: &Reader<B>, base: &Path, seed: u64, most: usize) {
    let content = std::fs::read(base).unwrap();
    let block = 4 * KIB as usize;
    let mut starts: Vec<usize> = (0..content.len()).step_by(block).collect();
    starts.shuffle(&mut StdRng::seed_from_u64(seed));
    for start in starts.into_iter().take(most) {
        let expected = &content[start..content.len().min(start + block)];
        let mut found = vec![0xa5; expected.len()];
        reader.read(&mut found, start as u64).unwrap();
        assert!(found == expected, "wrong bytes at {start}");
        say("read");
    }
}

fn fill(image: &Path, base: &Path, seed: u64) {
    let reader = Reader::new(open(image), file_base(base));
    read_randomly(&reader, base, seed, usize::MAX);
    drop(reader);
    say("done");
}

fn open_and_close(image: &Path, base: &Path, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let reader = Reader::new(open(image), file_base(base));
        read_randomly(&reader, base, rng.random(), 20);
        drop(reader);
        say("closed");
    }
}

fn read_all(image: &Path, base: &Path, seed: u64) {
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(image.with_file_name("reads.log"))
        .unwrap();
    let file = file_base(base);
    let noting = move |buf: &mut [u8], offset: u64| {
        // One write, so that lines of several processes do not mix.
        (&log).write_all(format!("{offset} {}\n", buf.len()).as_bytes())?;
        file.read(buf, offset)
    };
    let reader = Reader::new(open(image), noting);
    let content = std::fs::read(base).unwrap();
    say("open");
    io::stdin().lock().read_line(&mut String::new()).unwrap();
    let piece = 64 * KIB as usize;
    let pieces = content.len().div_ceil(piece);
    for index in (0..pieces).map(|index| (index + seed as usize) % pieces) {
        let expected = &content[index * piece..content.len().min((index + 1) * piece)];
        let mut found = vec![0xa5; expected.len()];
        reader.read(&mut found, (index * piece) as u64).unwrap();
        assert!(found == expected, "wrong bytes in piece {index}");
    }
    reader.engine().close();
    say(&format!("done {}", reader.engine().counters().dropped_bytes.get()));
}

fn serve(image: &Path, base: &Path, len: u64) {
    let file = file_base(base);
    let reads = AtomicU64::new(0);
    let counting = |buf: &mut [u8], at: u64| {
        reads.fetch_add(1, Ordering::Relaxed);
        file.read(buf, at)
    };
    let mut found = vec![0xa5; len as usize];
    Reader::new(open(image), counting).read(&mut found, 0).unwrap();
    assert!(found == std::fs::read(base).unwrap()[..len as usize]);
    say(&format!("done {} base reads", reads.into_inner()));
}

fn fill_small(image: &Path, base: &Path) {
    let image = image.parent().unwrap().join("small").join(image.file_name().unwrap());
    let reader = Reader::new(open(&image), file_base(base));
    read_randomly(&reader, base, 1, usize::MAX);
    read_randomly(&reader, base, 2, usize::MAX);
    drop(reader);
    let checked = qemu_img(&["check", "-f", "qcow2"], &[&image]);
    assert!(checked.status.success(), "{checked:?}");
    let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw"], &[&image, base]);
    assert!(compared.status.success(), "{compared:?}");
    say("done sound");
}

fn stuck(image: &Path) {
    let never = |_: &mut [u8], _: u64| -> io::Result<()> {
        say("fetching");
        loop {
            thread::sleep(Duration::from_secs(3600));
        }
    };
    let _ = Reader::new(open(image), never).read(&mut [0; 64 << 10], 0);
}
