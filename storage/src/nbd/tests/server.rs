//! A server for tests, in a thread: negotiates as told, then does with each request what a script says.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc;

use super::super::wire::*;

/// What the server states in its negotiation.
#[derive(Clone)]
pub(super) struct Offer {
    pub(super) size: u64,
    pub(super) flags: u16,
    pub(super) structured: bool,
    /// Smallest, preferred and largest block, if it states them.
    pub(super) blocks: Option<[u32; 3]>,
    /// Whether it knows GO.
    pub(super) go: bool,
}

impl Default for Offer {
    fn default() -> Self {
        let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;
        Self { size: 1 << 20, flags, structured: false, blocks: None, go: true }
    }
}

/// One connection, after the negotiation.
pub(super) struct Peer {
    pub(super) stream: UnixStream,
}

/// A request as it arrived.
#[derive(Debug, Clone, Default)]
pub(super) struct Arrived {
    pub(super) command: u16,
    pub(super) flags: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
    pub(super) data: Vec<u8>,
}

impl Peer {
    pub(super) fn send(&mut self, bytes: &[u8]) {
        // The client may be gone, which is what some tests are about.
        let _ = self.stream.write_all(bytes);
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).ok().map(|()| bytes)
    }

    /// The next request; `None` when the client is gone.
    pub(super) fn request(&mut self) -> Option<Arrived> {
        let header: [u8; REQUEST_BYTES] = self.take()?;
        let half = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u64::from_be_bytes(header[at..at + 8].try_into().unwrap());
        assert_eq!(header[..4], REQUEST_MAGIC.to_be_bytes());
        let len = u32::from_be_bytes(header[24..28].try_into().unwrap());
        let mut arrived = Arrived {
            flags: half(4),
            command: half(6),
            cookie: word(8),
            offset: word(16),
            len,
            data: Vec::new(),
        };
        if arrived.command == Command::Write as u16 {
            arrived.data.resize(len as usize, 0);
            self.stream.read_exact(&mut arrived.data).ok()?;
        }
        Some(arrived)
    }

    pub(super) fn simple(&mut self, cookie: u64, error: u32, data: &[u8]) {
        let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&error.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(data);
        self.send(&bytes);
    }

    pub(super) fn chunk(&mut self, cookie: u64, flags: u16, kind: u16, data: &[u8]) {
        let mut bytes = CHUNK_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.send(&bytes);
    }

    fn answer(&mut self, option: u32, kind: u32, data: &[u8]) {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        self.send(&bytes);
    }

    /// The negotiation as the specification has it; `None` when the client leaves.
    pub(super) fn negotiate(&mut self, offer: &Offer) -> Option<()> {
        self.send(&MAGIC.to_be_bytes());
        self.send(&OPTION_MAGIC.to_be_bytes());
        self.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        let flags: [u8; 4] = self.take()?;
        assert_eq!(u32::from_be_bytes(flags), 3);
        loop {
            let magic: [u8; 8] = self.take()?;
            assert_eq!(u64::from_be_bytes(magic), OPTION_MAGIC);
            let option = u32::from_be_bytes(self.take()?);
            let len = u32::from_be_bytes(self.take()?);
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).ok()?;
            let mut export = offer.size.to_be_bytes().to_vec();
            export.extend_from_slice(&offer.flags.to_be_bytes());
            match option {
                OPT_STRUCTURED_REPLY if offer.structured => self.answer(option, REP_ACK, &[]),
                OPT_GO if offer.go => {
                    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                    info.extend_from_slice(&export);
                    self.answer(option, REP_INFO, &info);
                    if let Some(blocks) = offer.blocks {
                        let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                        blocks.iter().for_each(|block| info.extend_from_slice(&block.to_be_bytes()));
                        self.answer(option, REP_INFO, &info);
                    }
                    self.answer(option, REP_ACK, &[]);
                    return Some(());
                }
                OPT_EXPORT_NAME => {
                    self.send(&export);
                    return Some(());
                }
                other => self.answer(other, ERR_UNSUP, &[]),
            }
        }
    }

    /// Serves a disk in memory; ends when the client leaves. Returns what arrived.
    pub(super) fn serve(&mut self, disk: &mut [u8], structured: bool) -> Vec<Arrived> {
        let mut list = Vec::new();
        while let Some(arrived) = self.request() {
            let range = arrived.offset as usize..arrived.offset as usize + arrived.len as usize;
            match arrived.command {
                0 if structured => {
                    let mut data = arrived.offset.to_be_bytes().to_vec();
                    data.extend_from_slice(&disk[range]);
                    self.chunk(arrived.cookie, CHUNK_DONE, CHUNK_DATA, &data);
                }
                0 => self.simple(arrived.cookie, 0, &disk[range]),
                1 => {
                    disk[range].copy_from_slice(&arrived.data);
                    self.simple(arrived.cookie, 0, &[]);
                }
                2 => break,
                6 => {
                    disk[range].fill(0);
                    self.simple(arrived.cookie, 0, &[]);
                }
                _ => self.simple(arrived.cookie, 0, &[]),
            }
            list.push(Arrived { data: Vec::new(), ..arrived });
        }
        list
    }
}

/// A listening server whose connections go one after the other through a script.
pub(super) struct Server<T> {
    pub(super) address: String,
    pub(super) socket: PathBuf,
    results: mpsc::Receiver<T>,
    _folder: tempfile::TempDir,
}

impl<T: Send + 'static> Server<T> {
    /// `script` is called with each connection and its number, until it returns `None`.
    pub(super) fn start(mut script: impl FnMut(Peer, usize) -> Option<T> + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, results) = mpsc::channel();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { return };
                match script(Peer { stream }, number) {
                    Some(result) => drop(sender.send(result)),
                    None => return,
                }
            }
        });
        let address = format!("nbd+unix:///export?socket={}", socket.display());
        Self { address, socket, results, _folder: folder }
    }

    /// What the script returned for the next connection that ended.
    pub(super) fn result(&self) -> T {
        self.results.recv_timeout(std::time::Duration::from_secs(60)).expect("the script ended")
    }
}
