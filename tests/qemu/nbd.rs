//! A client for the Network Block Device protocol, for reading from `qemu-nbd` with many requests
//! in flight. After `doc/proto.md` of the NBD project: fixed newstyle handshake, `NBD_OPT_GO`,
//! simple replies, matched by their cookies.
//!
//! By hand because the crates that exist answer one request at a time or bring an async runtime.
//!
//! Used by `lab` and the tests.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBD_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Client flags: fixed newstyle, no zeroes after the handshake.
const CLIENT_FLAGS: u32 = 3;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;

/// Requests that `qemu-nbd` works on at once for one client (`MAX_NBD_REQUESTS` in `nbd/server.c`).
pub const DEPTH: usize = 16;

/// How long an answer may take: more than any deadline of the driver's.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to one export.
pub struct Client {
    stream: UnixStream,
    size: u64,
    next_cookie: u64,
    waiting: HashMap<u64, (u64, u32)>,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects to the default export behind a socket.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let (next_cookie, waiting, buffer) = (1, HashMap::new(), Vec::new());
        let mut client = Client { stream, size: 0, next_cookie, waiting, buffer };
        client.shake_hands()?;
        Ok(client)
    }

    fn shake_hands(&mut self) -> io::Result<()> {
        expect("magic", self.u64()?, NBD_MAGIC)?;
        expect("option magic", self.u64()?, OPTION_MAGIC)?;
        let _server_flags = self.u16()?;
        let mut hello = Vec::new();
        hello.extend(CLIENT_FLAGS.to_be_bytes());
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        // An empty export name and no requests for information.
        hello.extend(6u32.to_be_bytes());
        hello.extend([0; 6]);
        self.stream.write_all(&hello)?;
        loop {
            expect("option reply magic", self.u64()?, OPTION_REPLY_MAGIC)?;
            expect("option", self.u32()?, OPT_GO)?;
            let (kind, len) = (self.u32()?, self.u32()?);
            let mut payload = vec![0; len as usize];
            self.stream.read_exact(&mut payload)?;
            match kind {
                REP_ACK => return Ok(()),
                REP_INFO => self.note_info(&payload),
                _ => return Err(io::Error::other(format!("NBD option refused: {kind:#x}"))),
            }
        }
    }

    fn note_info(&mut self, payload: &[u8]) {
        if let Some((kind, rest)) = payload.split_first_chunk()
            && let (INFO_EXPORT, Some(size)) = (u16::from_be_bytes(*kind), rest.first_chunk())
        {
            self.size = u64::from_be_bytes(*size);
        }
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Requests without an answer so far.
    pub fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    /// Asks for some bytes.
    pub fn send(&mut self, offset: u64, len: u32) -> io::Result<()> {
        let mut request = Vec::with_capacity(28);
        request.extend(REQUEST_MAGIC.to_be_bytes());
        // No flags; command 0 is a read.
        request.extend([0; 4]);
        request.extend(self.next_cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        self.waiting.insert(self.next_cookie, (offset, len));
        self.next_cookie += 1;
        self.stream.write_all(&request)
    }

    /// The next answer, to whichever request: its offset and bytes. A read that the server refused
    /// fails the test: nothing here asks for anything that may be refused.
    pub fn receive(&mut self) -> io::Result<(u64, &[u8])> {
        expect("reply magic", self.u32()?, REPLY_MAGIC)?;
        let error = self.u32()?;
        let cookie = self.u64()?;
        let (offset, len) = self
            .waiting
            .remove(&cookie)
            .ok_or_else(|| io::Error::other(format!("a reply to nothing: cookie {cookie}")))?;
        assert_eq!(error, 0, "reading {len} bytes at {offset} failed");
        self.buffer.resize(len as usize, 0);
        self.stream.read_exact(&mut self.buffer)?;
        Ok((offset, &self.buffer))
    }

    /// Makes all these reads, [`DEPTH`] at a time, and holds the answers against what the disk has
    /// to show. Returns how many bytes came.
    pub fn read_and_compare(
        &mut self,
        content: &[u8],
        reads: impl IntoIterator<Item = (u64, u32)>,
    ) -> io::Result<u64> {
        let mut reads = reads.into_iter();
        let mut bytes = 0;
        loop {
            for (offset, len) in reads.by_ref().take(DEPTH - self.in_flight()) {
                self.send(offset, len)?;
            }
            if self.in_flight() == 0 {
                return Ok(bytes);
            }
            let (offset, data) = self.receive()?;
            assert_equal(offset, data, content);
            bytes += data.len() as u64;
        }
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn expect<T: PartialEq + std::fmt::LowerHex>(what: &str, got: T, wanted: T) -> io::Result<()> {
    (got == wanted)
        .then_some(())
        .ok_or_else(|| io::Error::other(format!("NBD {what} is {got:#x}, not {wanted:#x}")))
}

/// Holds bytes of the disk against what it has to show.
pub fn assert_equal(offset: u64, data: &[u8], content: &[u8]) {
    let wanted = &content[offset as usize..][..data.len()];
    if data != wanted {
        let wrong = data.iter().zip(wanted).filter(|(got, want)| got != want).count();
        let first = data.iter().zip(wanted).position(|(got, want)| got != want).unwrap_or(0);
        panic!(
            "WRONG BYTES: {wrong} of the {} from {offset:#x} on, the first at {:#x}: {:#04x} \
             instead of {:#04x}",
            data.len(),
            offset + first as u64,
            data[first],
            wanted[first]
        );
    }
}
