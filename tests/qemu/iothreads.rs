//! Many requests at once inside one process, for ranges that overlap: each block is fetched once.

use crate::lab::{Base, Cache, DISK, Lab, Over, Server, noise};
use crate::process::{Output, Tool};
use crate::virtio::{BATCH, LARGEST, Machine, Queue};

const SYSTEM: &str = "qemu-system-x86_64";

/// Reads of the whole disk, each overlapping the one before by half.
fn overlapping(len: usize) -> impl Iterator<Item = (u64, u32)> {
    (0..DISK).step_by(len / 2).map(move |at| (at as u64, len.min(DISK - at) as u32))
}

/// Reads of the whole disk for two queues, each overlapping two of the other queue.
fn interleaved(len: usize) -> [Vec<(u64, u32)>; 2] {
    let mut all = overlapping(len);
    let mut queues = [vec![], vec![]];
    while let Some(read) = all.next() {
        queues[0].push(read);
        queues[1].extend(all.next());
    }
    queues
}

/// The program, saying so when a wait for a block comes to its deadline.
fn telling_of_deadlines(tool: Tool) -> Tool {
    tool.under(["env", "VMCACHE_LOG=vmcache::engine::wait=debug"])
}

/// Whether each block was fetched once. On a machine so busy that a wait came to its deadline,
/// whoever waited fetched for himself.
#[track_caller]
fn assert_once(fetched: u64, said: &Output) {
    let late = said.stderr.lines().filter(|line| line.contains("dead or late")).count();
    println!("{fetched} bytes fetched of {DISK}; {late} deadlines passed");
    let twice = fetched - DISK as u64;
    // One deadline frees all that was claimed at that moment.
    let most = (late * 2 * BATCH * LARGEST) as u64;
    assert!(twice <= most, "{twice} bytes twice, {late} deadlines");
}

fn base(lab: &Lab) -> Base {
    lab.base_of(noise(DISK), "raw", Over::File)
}

fn drive(id: &str, cache: &Cache) -> [String; 2] {
    ["-drive".into(), format!("if=none,id={id},{},read-only=on", cache.options())]
}

fn device(options: &str) -> [String; 2] {
    // Each request by itself, though neighbours stand side by side in the queue.
    let common = r#""driver":"virtio-blk-pci","request-merging":false"#;
    ["-device".into(), format!("{{{common},{options}}}")]
}

/// Reads through two queues of two iothreads, first with an empty cache and then with a full one.
fn assert_each_block_is_fetched_once(
    mut machine: Machine,
    mut queues: Vec<Queue>,
    cache: &Cache,
    len: usize,
) {
    let content = &cache.base.content;
    let reads = interleaved(len);
    machine.read_and_compare(&mut queues, &reads, content);
    let fetched = cache.stats().get("base-bytes");
    // The driver answers hits in the thread that asks, so that it shows which did.
    let before = ["t0", "t1"].map(|thread| machine.bytes_read_by(thread));
    machine.read_and_compare(&mut queues, &reads, content);
    let after = ["t0", "t1"].map(|thread| machine.bytes_read_by(thread));
    let said = machine.stop();

    let asked = reads.map(|reads| reads.iter().map(|(_, len)| u64::from(*len)).sum::<u64>());
    let read = [after[0] - before[0], after[1] - before[1]];
    println!("read by the iothreads: {read:?} of {asked:?}");
    assert_once(fetched, &said);
    assert!(read[0] >= asked[0] / 2 && read[1] >= asked[1] / 2, "{read:?} of {asked:?}");
    cache.assert_sound();
}

/// One disk with two queues, each in an iothread of its own.
fn one_node(len: usize) {
    let lab = Lab::new();
    let cache = lab.cache(&base(&lab), "");
    let mapping = r#"[{"iothread":"t0","vqs":[0]},{"iothread":"t1","vqs":[1]}]"#;
    let options =
        format!(r#""addr":"04","drive":"d0","num-queues":2,"iothread-vq-mapping":{mapping}"#);
    let args = [drive("d0", &cache), device(&options)].concat();
    let mut machine = Machine::start(&lab, telling_of_deadlines(Tool::driver(SYSTEM)), &args);
    let queues = machine.disk(4, 2);
    assert_each_block_is_fetched_once(machine, queues, &cache, len);
}

/// Two disks of one image, each in an iothread of its own.
fn two_nodes(len: usize) {
    let lab = Lab::new();
    let cache = lab.cache(&base(&lab), "");
    let args = [
        drive("d0", &cache),
        drive("d1", &cache),
        device(r#""addr":"04","drive":"d0","num-queues":1,"iothread":"t0""#),
        device(r#""addr":"05","drive":"d1","num-queues":1,"iothread":"t1""#),
    ]
    .concat();
    let mut machine = Machine::start(&lab, telling_of_deadlines(Tool::driver(SYSTEM)), &args);
    let queues = [machine.disk(4, 1), machine.disk(5, 1)].into_iter().flatten().collect();
    assert_each_block_is_fetched_once(machine, queues, &cache, len);
}

#[test]
fn one_node_read_by_two_iothreads_fetches_each_block_once() {
    let help = Tool::stock(SYSTEM).args(["-device", "virtio-blk-pci,help"]).run();
    if !help.stdout.contains("iothread-vq-mapping") {
        println!("skipped: a node of this QEMU has one iothread at a time");
        return;
    }
    one_node(8 << 10);
    one_node(LARGEST);
}

#[test]
fn two_nodes_of_one_image_in_two_iothreads_fetch_each_block_once() {
    two_nodes(8 << 10);
    two_nodes(LARGEST);
}

#[test]
fn overlapping_requests_in_one_thread_fetch_each_block_once() {
    let lab = Lab::new();
    let cache = lab.cache(&base(&lab), "");
    let content = &cache.base.content;
    let nbd = telling_of_deadlines(Tool::driver("qemu-nbd"));
    let server = Server::start(&lab, nbd, &["-r", "--image-opts", &cache.options()]);
    server.connect().read_and_compare(content, overlapping(LARGEST)).expect("reads");
    let said = server.stop();
    let stats = cache.stats();
    assert_once(stats.get("base-bytes"), &said);
    assert!(stats.get("waited-bytes") > 0);
    cache.assert_sound();
}
