//! `strace` around QEMU's programs: to kill one exactly before its n-th call of a kind, and to make
//! calls of a running one take long, so that what happens in the middle of them can be seen.
//!
//! Used by the tests.

use std::ffi::OsStr;
use std::fs;

use crate::lab::Lab;
use crate::process::{Child, Tool, eventually};

/// The program, killed when a thread of it is about to make its `number`-th call of this name.
pub fn killed_at(lab: &Lab, tool: Tool, call: &str, number: u32) -> Tool {
    let log = lab.fresh("strace").into_os_string();
    let trace = format!("trace={call}");
    let inject = format!("inject={call}:signal=KILL:when={number}");
    // -D: the program is the child, not strace.
    let words = ["strace", "-D", "-f", "-qq", "-e", &trace, "-e", &inject, "-o"];
    tool.under(words.into_iter().map(OsStr::new).chain([log.as_os_str()]))
}

/// Calls of a running process that take long, until this is dropped.
pub struct Delay {
    _strace: Child,
}

impl Delay {
    /// Lets calls begin late from each thread's `first`-th on; several names have commas between
    /// them.
    pub fn attach(lab: &Lab, process: u32, calls: &str, first: u32, seconds: u32) -> Self {
        let strace = Tool::host("strace")
            .args(["-f", "-qq", "-e", &format!("trace={calls}"), "-e"])
            .arg(format!("inject={calls}:delay_enter={seconds}s:when={first}+"))
            .args(["-p", &process.to_string(), "-o"])
            .arg(lab.fresh("strace"))
            .start_in_background();
        eventually("strace has all threads", || is_traced(process));
        Delay { _strace: strace }
    }
}

/// Whether all threads of a process have a tracer.
fn is_traced(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("a process");
    tasks.map(|task| task.expect("a thread").path().join("status")).all(|status| {
        // A thread may have ended meanwhile.
        fs::read_to_string(status).is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
    })
}
