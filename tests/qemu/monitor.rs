//! A QEMU's monitor: commands, answers and events of the QEMU Machine Protocol (QMP).
//!
//! Used by `system` and the tests.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use serde_json::{Value, json};

use crate::process::{PATIENCE, eventually};

/// A connection to a monitor.
pub struct Monitor {
    input: Box<dyn Write>,
    lines: Receiver<String>,
    events: Vec<Value>,
    /// What commands printed for people, as far as it has come.
    printed: String,
}

impl Monitor {
    /// One behind a pair of pipes.
    pub fn over(input: impl Write + 'static, output: impl Read + Send + 'static) -> Self {
        let (told, lines) = channel();
        // Ends with QEMU; its end is seen as the end of the channel.
        thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.for_each(|line| drop(told.send(line)));
        });
        let (events, printed) = (Vec::new(), String::new());
        let mut monitor = Monitor { input: Box::new(input), lines, events, printed };
        monitor.read();
        monitor.command("qmp_capabilities", json!({}));
        monitor
    }

    /// One behind a socket that QEMU makes.
    pub fn connect(socket: &Path) -> Self {
        let mut stream = None;
        eventually("QEMU listens", || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.expect("a connection");
        Self::over(stream.try_clone().expect("a descriptor"), stream)
    }

    fn read(&mut self) -> Value {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) if line.starts_with('{') => {
                    return serde_json::from_str(&line).expect("JSON");
                }
                Ok(line) => self.note(&line),
                Err(err) => panic!("no answer from QEMU: {err}"),
            }
        }
    }

    fn note(&mut self, line: &str) {
        self.printed.push_str(line);
        self.printed.push('\n');
    }

    /// Ends QEMU, which has to close its output, and gives what commands printed there for people.
    pub fn quit(mut self) -> String {
        self.command("quit", json!({}));
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.note(&line);
        }
        self.printed
    }

    /// Runs a command and gives its answer.
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        let command = format!("{}\n", json!({ "execute": name, "arguments": arguments }));
        // In one piece: QEMU obeys at the closing brace, and to `quit` so fast that the rest of the
        // line would find nobody.
        self.input.write_all(command.as_bytes()).expect("a monitor");
        loop {
            let answer = self.read();
            match answer.get("event") {
                Some(_) => self.events.push(answer),
                None => return answer,
            }
        }
    }

    /// Runs a command that must succeed and gives what it returns.
    #[track_caller]
    pub fn run(&mut self, name: &str, arguments: Value) -> Value {
        let mut answer = self.command(name, arguments);
        assert!(answer.get("return").is_some(), "{name}: {answer}");
        answer["return"].take()
    }

    /// Runs a command that must fail and gives what it says.
    #[track_caller]
    pub fn refusal(&mut self, name: &str, arguments: Value) -> String {
        let answer = self.command(name, arguments);
        let said = answer["error"]["desc"].as_str();
        said.unwrap_or_else(|| panic!("{name}: {answer}")).to_owned()
    }

    /// Runs a command of the monitor for people and gives what it prints.
    pub fn for_people(&mut self, command: &str) -> String {
        let printed = self.run("human-monitor-command", json!({ "command-line": command }));
        printed.as_str().expect("text").to_owned()
    }

    /// Waits for an event and gives what it says; each is given once.
    pub fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(index) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(index)["data"].take();
            }
            let event = self.read();
            self.events.push(event);
        }
    }
}
