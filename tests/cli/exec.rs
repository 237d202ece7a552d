//! `vmcache exec`: programs with the library loaded.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use crate::dir::{CACHE, Dir, MIB, Run, copy_program, library};

fn exec(dir: &Dir, arguments: &[&str]) -> Run {
    dir.vmcache_with_library(&[&["exec"], arguments].concat())
}

#[test]
fn a_shell_runs_with_the_library_loaded() {
    let run = exec(&Dir::new(), &["sh", "-c", "echo ok; echo $LD_PRELOAD"]).exits(0);
    let library = fs::canonicalize(library()).unwrap();
    assert_eq!(run.stdout, format!("ok\n{}\n", library.display()));
    assert_eq!(run.stderr, "");
}

#[test]
fn the_exit_code_is_the_programs_own() {
    exec(&Dir::new(), &["sh", "-c", "exit 42"]).exits(42);
}

#[test]
fn arguments_that_look_like_options_are_the_programs() {
    let run = exec(&Dir::new(), &["echo", "--help", "-p", "--", "-x"]).exits(0);
    assert_eq!(run.stdout, "--help -p -- -x\n");
}

#[test]
fn a_program_that_is_not_found_is_127() {
    exec(&Dir::new(), &["./no-such-program"])
        .exits(127)
        .complains("could not run './no-such-program': No such file");
}

#[test]
fn a_program_that_cannot_be_run_is_126() {
    let dir = Dir::new();
    dir.write("text", b"no program");
    exec(&dir, &["./text"]).exits(126).complains("could not run './text': Permission denied");
}

#[test]
fn a_library_that_is_not_there_is_125() {
    Dir::new()
        .vmcache_with("VMCACHE_LIBRARY", "/nonexistent/libvmcache.so", &["exec", "true"])
        .exits(125)
        .complains("could not use the driver library '/nonexistent/libvmcache.so': No such file");
}

#[test]
fn a_library_that_the_linker_cannot_be_told_of_is_refused() {
    let dir = Dir::new();
    dir.write("a b.so", b"");
    dir.vmcache_with("VMCACHE_LIBRARY", &dir.text("a b.so"), &["exec", "true"])
        .exits(125)
        .complains("no path with spaces or colons");
}

#[test]
fn nothing_to_run_is_refused() {
    Dir::new().refuses(&["exec"], 125, "PROGRAM");
}

/// A copy of the program in `bin`.
fn install(dir: &Dir) -> Command {
    fs::create_dir(dir.path("bin")).unwrap();
    copy_program(&dir.path("bin/vmcache"));
    let mut command = Command::new(dir.path("bin/vmcache"));
    command.args(["exec", "sh", "-c", "echo $LD_PRELOAD"]).env_remove("VMCACHE_LIBRARY");
    command
}

#[test]
fn an_installed_library_is_found_in_lib() {
    let dir = Dir::new();
    let mut command = install(&dir);
    fs::create_dir(dir.path("lib")).unwrap();
    fs::copy(library(), dir.path("lib/libvmcache.so")).unwrap();
    let output = command.output().unwrap();
    let found = fs::canonicalize(dir.path("lib/libvmcache.so")).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), found.to_str().unwrap());
}

#[test]
fn a_library_beside_the_program_is_found() {
    let dir = Dir::new();
    let mut command = install(&dir);
    fs::copy(library(), dir.path("bin/libvmcache.so")).unwrap();
    let output = command.output().unwrap();
    let found = fs::canonicalize(dir.path("bin/libvmcache.so")).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), found.to_str().unwrap());
}

#[test]
fn an_installed_library_keeps_its_soname_over_an_update() {
    let dir = Dir::new();
    let mut command = install(&dir);
    fs::create_dir(dir.path("lib")).unwrap();
    fs::copy(library(), dir.path("lib/libvmcache.so.0.1.0")).unwrap();
    symlink("libvmcache.so.0.1.0", dir.path("lib/libvmcache.so.0")).unwrap();
    let output = command.output().unwrap();
    let found = fs::canonicalize(dir.path("lib")).unwrap().join("libvmcache.so.0");
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), found.to_str().unwrap());
}

#[test]
fn a_wrapper_starts_the_program_it_is_called_after() {
    let dir = Dir::with_cache(MIB);
    install(&dir);
    symlink("vmcache", dir.path("bin/qemu-img-vmcache")).unwrap();
    let cache = format!("driver=vmcache,file.filename={}", dir.text(CACHE));
    let output = Command::new(dir.path("bin/qemu-img-vmcache"))
        .args(["info", "--image-opts", &cache])
        .env("VMCACHE_LIBRARY", library())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("file format: vmcache"), "{said}");
}

#[test]
fn a_wrapper_around_a_wrapper_is_one() {
    let dir = Dir::with_cache(MIB);
    install(&dir);
    symlink("vmcache", dir.path("bin/qemu-img-vmcache")).unwrap();
    let wrapper = dir.text("bin/qemu-img-vmcache");
    let cache = format!("driver=vmcache,file.filename={}", dir.text(CACHE));
    let run = exec(&dir, &[&wrapper, "info", "--image-opts", &cache]).exits(0);
    assert_eq!(run.stderr, "");
    run.prints("file format: vmcache");
}

#[test]
fn a_wrapper_whose_program_is_not_there_says_which_it_is() {
    let dir = Dir::new();
    install(&dir);
    symlink("vmcache", dir.path("bin/qemu-none-vmcache")).unwrap();
    let output = Command::new(dir.path("bin/qemu-none-vmcache"))
        .env("VMCACHE_LIBRARY", library())
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert!(message.contains("could not run 'qemu-none': No such file"), "{message}");
}

#[test]
fn without_a_library_anywhere_the_message_says_where_it_was_looked_for() {
    let dir = Dir::new();
    let output = install(&dir).output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(message.contains("could not find libvmcache.so.0 or libvmcache.so in"), "{message}");
    assert!(message.contains("VMCACHE_LIBRARY"), "{message}");
}

#[test]
fn qemu_img_reads_the_base_through_the_cache() {
    let dir = Dir::with_cache(MIB);
    let cache = format!("driver=vmcache,file.filename={}", dir.text(CACHE));
    exec(&dir, &["qemu-img", "convert", "--image-opts", &cache, "-O", "raw", "copy.raw"]).exits(0);
    assert!(fs::read(dir.path("copy.raw")).unwrap() == fs::read(dir.path("base.raw")).unwrap());
    dir.is_sound_to_qemu();
}

#[test]
fn qemu_takes_the_drive_argument_with_commas_in_names() {
    let dir = Dir::with_cache(MIB);
    fs::rename(dir.path(CACHE), dir.path("a, b,c.qcow2")).unwrap();
    let create = ["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "v, m.qcow2"];
    dir.qemu("qemu-img", &create).exits(0);
    let drive =
        dir.vmcache(&["drive", "--id", "d0", "--overlay", "v, m.qcow2", "a, b,c.qcow2"]).stdout;
    let arguments = ["-M", "none", "-display", "none", "-monitor", "none", "-qmp", "stdio"];
    // Standard input at its end is the end of QEMU's monitor, not of QEMU.
    let script = "printf '%s\\n' '{\"execute\":\"qmp_capabilities\"}' \
                  '{\"execute\":\"query-named-block-nodes\"}' '{\"execute\":\"quit\"}' | \
                  exec qemu-system-x86_64 \"$@\"";
    let command =
        [&["sh", "-c", script, "sh"], &arguments[..], &["-drive", drive.trim_end()]].concat();
    exec(&dir, &command).exits(0).prints("\"drv\": \"vmcache\"");
}
