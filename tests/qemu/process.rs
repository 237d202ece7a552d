//! QEMU's programs as child processes. Each has a deadline, and none outlives the value that stands
//! for it: a failing test leaves nothing running.
//!
//! Used by `lab` and the tests.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek};
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::settings::{LIBRARY, PATCHED, PREFIX, Patched, VMCACHE};

/// What no child takes, however busy the machine is.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A program with its arguments, ready to be started.
#[derive(Clone)]
pub struct Tool {
    words: Vec<OsString>,
}

impl Tool {
    /// A QEMU program with the driver: the library is preloaded, or the program loads it itself.
    pub fn driver(program: &str) -> Self {
        match &*PATCHED {
            Some(patched) => {
                Self::patched(patched, program).env("LD_LIBRARY_PATH", &patched.library)
            }
            None => Self::preloaded(program),
        }
    }

    /// A program of a QEMU with the driver in its tree, which does not find the library.
    pub fn patched(patched: &Patched, program: &str) -> Self {
        let place = match program {
            "qemu-storage-daemon" => "storage-daemon",
            _ => "",
        };
        let tool = Self::host("env")
            // In a build directory not all programs find their modules.
            .env("QEMU_MODULE_DIR", &patched.programs)
            .arg(patched.programs.join(place).join(program));
        match program {
            "qemu-system-x86_64" => {
                tool.args(["-L", "/usr/share/seabios", "-L", "/usr/share/qemu"])
            }
            _ => tool,
        }
    }

    fn preloaded(program: &str) -> Self {
        let mut preload = OsString::from("LD_PRELOAD=");
        preload.push(&*LIBRARY);
        Self::words().arg("env").arg(preload).arg(program)
    }

    /// A QEMU program as its distribution made it.
    pub fn stock(program: &str) -> Self {
        Self::words().arg(program)
    }

    /// The command line of this project.
    pub fn vmcache() -> Self {
        Self::words().arg(VMCACHE)
    }

    /// A program of this machine that has nothing to do with QEMU.
    pub fn host(program: &str) -> Self {
        Tool { words: vec![program.into()] }
    }

    fn words() -> Self {
        Tool { words: PREFIX.iter().map(OsString::from).collect() }
    }

    /// Sets a variable of a program that is started by `env`.
    fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut word = OsString::from(name);
        word.push("=");
        word.push(value);
        self.words.insert(1, word);
        self
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.words.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.words.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// The same program started by another one, whose words come first.
    pub fn under<A: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = A>) -> Self {
        self.words.splice(0..0, words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Runs the program to its end.
    pub fn run(self) -> Output {
        self.start(Stdio::null()).wait()
    }

    /// Starts the program with a pipe to its standard input.
    pub fn start_with_input(self) -> Child {
        self.start(Stdio::piped())
    }

    /// Starts the program without input.
    pub fn start_in_background(self) -> Child {
        self.start(Stdio::null())
    }

    /// Starts the program with pipes to its standard input and output.
    pub fn start_with_pipes(self) -> (Child, ChildStdin, ChildStdout) {
        let mut child = self.spawn(Stdio::piped(), Some(Stdio::piped()));
        let input = child.process.stdin.take().expect("a pipe");
        let output = child.process.stdout.take().expect("a pipe");
        (child, input, output)
    }

    fn start(self, stdin: Stdio) -> Child {
        self.spawn(stdin, None)
    }

    fn spawn(self, stdin: Stdio, stdout: Option<Stdio>) -> Child {
        let [said, complained] = [(); 2].map(|()| tempfile::tempfile().expect("a temporary file"));
        let to = |file: &File| Stdio::from(file.try_clone().expect("a descriptor"));
        let process = Command::new(&self.words[0])
            .args(&self.words[1..])
            .env_remove("LD_PRELOAD")
            .env_remove("VMCACHE_LOG")
            .stdin(stdin)
            .stdout(stdout.unwrap_or_else(|| to(&said)))
            .stderr(to(&complained))
            .spawn()
            .unwrap_or_else(|err| panic!("could not start {:?}: {err}", self.words));
        Child { process, said, complained, words: self.words, ended: None }
    }
}

/// What a program left behind.
pub struct Output {
    words: Vec<OsString>,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Its exit code; there is none where a signal ended it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Its output; it must have succeeded.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(self.status.success(), "{self:?}");
        self
    }

    /// Its output; it must have failed by itself.
    #[track_caller]
    pub fn failure(self) -> Self {
        assert!(self.code().is_some_and(|code| code != 0), "{self:?}");
        self
    }

    /// The lines that the driver logged.
    pub fn warnings(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("vmcache: ")).collect()
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{:?}: {}", self.words, self.status)?;
        write!(f, "stdout:\n{}stderr:\n{}", self.stdout, self.stderr)
    }
}

/// A running program, killed when dropped.
pub struct Child {
    process: std::process::Child,
    said: File,
    complained: File,
    words: Vec<OsString>,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// The pipe to its standard input, once.
    pub fn take_input(&mut self) -> ChildStdin {
        self.process.stdin.take().expect("a pipe to the child's standard input")
    }

    /// Sends it a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none() {
            // It may end at any moment.
            let _ = signal::kill(Pid::from_raw(self.id() as i32), signal);
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        self.await_end();
    }

    /// Asks it to end, as a service manager does, and waits for it.
    pub fn terminate(self) -> Output {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Output {
        let status = self.await_end();
        let (stdout, stderr) = (read(&mut self.said), self.complaints());
        Output { words: std::mem::take(&mut self.words), status, stdout, stderr }
    }

    /// Its standard error.
    pub fn complaints(&mut self) -> String {
        read(&mut self.complained)
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.ended = self.ended.or_else(|| self.process.try_wait().expect("the child's state"));
        self.ended.is_some()
    }

    fn await_end(&mut self) -> ExitStatus {
        let what = format!("{:?} ends", self.words);
        eventually(&what, || self.has_ended());
        self.ended.expect("it has ended")
    }
}

fn read(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("the child's output");
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // Nothing can be done about a child that does not even take this.
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Waits until something is true, and fails when that takes too long.
#[track_caller]
pub fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
