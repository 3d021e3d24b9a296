//! Small servers on the host that guests talk to. Each runs on threads of its own until the test program ends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

/// A server on a TCP port.
#[derive(Clone)]
pub struct Server {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Server {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// How many connections it ever had.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// The most connections that it had at a time (of [`echo`] only).
    #[must_use]
    pub fn most_at_once(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    fn listen(address: &str) -> Result<(TcpListener, Self)> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let address = listener.local_addr().context("no address")?;
        Ok((listener, Self { address, connections: Arc::default(), open: Arc::default() }))
    }
}

/// What an HTTP server has.
#[derive(Clone)]
pub enum Content {
    /// The same for every path.
    Bytes(Arc<Vec<u8>>),
    /// The files of a folder.
    Folder(PathBuf),
}

/// An HTTP/1.0 server on `address` (port 0: any).
///
/// # Errors
/// If the address cannot be had.
pub fn http(address: &str, content: Content) -> Result<Server> {
    let (listener, server) = Server::listen(address)?;
    let connections = server.connections.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            connections.fetch_add(1, Ordering::SeqCst);
            let content = content.clone();
            std::thread::spawn(move || drop(answer(stream, &content)));
        }
    });
    Ok(server)
}

fn answer(mut stream: TcpStream, content: &Content) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < 64 << 10 {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            count => request.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let mut words = request.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or("/"));
    let body = match content {
        Content::Bytes(bytes) => Some(bytes.as_ref().clone()),
        Content::Folder(_) if path.contains("..") => None,
        // A proxy is asked for a whole address.
        Content::Folder(folder) => {
            let path = path.strip_prefix("http://").and_then(|p| p.split_once('/')).map_or(path, |(_, p)| p);
            std::fs::read(folder.join(path.trim_start_matches('/'))).ok()
        }
    };
    let status = if body.is_some() { "200 OK" } else { "404 Not Found" };
    let body = body.unwrap_or_default();
    let head = format!("HTTP/1.0 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(&body)?;
    }
    stream.flush()
}

/// A server on `address` that sends back what it gets, for thousands of connections at a time.
///
/// # Errors
/// If the address cannot be had.
pub fn echo(address: &str) -> Result<Server> {
    let (listener, server) = Server::listen(address)?;
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    // Four thousand may knock before the first is let in.
    rustix::net::listen(&listener, 4096).context("cannot lengthen the queue of the listener")?;
    raise_descriptor_limit();
    let (connections, most) = (server.connections.clone(), server.open.clone());
    std::thread::spawn(move || {
        let mut streams: Vec<TcpStream> = Vec::new();
        loop {
            while let Ok((stream, _)) = listener.accept() {
                connections.fetch_add(1, Ordering::SeqCst);
                if stream.set_nonblocking(true).is_ok() {
                    streams.push(stream);
                }
                most.fetch_max(streams.len(), Ordering::SeqCst);
            }
            streams.retain_mut(|stream| {
                let mut buffer = [0; 512];
                match stream.read(&mut buffer) {
                    Ok(0) => false,
                    Ok(count) => stream.write_all(buffer.get(..count).unwrap_or_default()).is_ok(),
                    Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
                }
            });
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    Ok(server)
}

/// A DNS server at `address` that knows one name and its IPv4 address, and says of every other one that there is none
/// (RFC 1035, section 4).
///
/// # Errors
/// If the address cannot be had: port 53 takes root.
pub fn dns(address: &str, name: &str, ip: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    // Labels with their lengths, as in a question.
    let wire: Vec<u8> = name
        .split('.')
        .flat_map(|label| std::iter::once(label.len() as u8).chain(label.bytes()))
        .chain(std::iter::once(0))
        .collect();
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut query) {
            if let Some(answer) = dns_answer(query.get(..len).unwrap_or_default(), &wire, ip) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    Ok(())
}

fn dns_answer(query: &[u8], name: &[u8], ip: Ipv4Addr) -> Option<Vec<u8>> {
    let end = 12 + query.get(12..)?.iter().position(|byte| *byte == 0)? + 1;
    let (asked, kind) = (query.get(12..end)?, query.get(end..end + 2)?);
    let known = asked.eq_ignore_ascii_case(name);
    let has = known && kind == [0, 1];
    let mut answer = query.get(..2)?.to_vec();
    // A response, recursion available; no error or no such name; one question, no or one answer.
    answer.extend([0x81, if known { 0x80 } else { 0x83 }, 0, 1, 0, u8::from(has), 0, 0, 0, 0]);
    answer.extend(query.get(12..end + 4)?);
    if has {
        // The name of the question, type A, class IN, 60 seconds, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(ip.octets());
    }
    Some(answer)
}

/// As many descriptors as the host lets this process have.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Gets `path` from the HTTP server at `address`, waiting for the answer for at most `patience`.
///
/// # Errors
/// If there is no connection or no answer.
pub fn get(address: SocketAddr, path: &str, patience: Duration) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&address, patience).context("cannot connect")?;
    stream.set_read_timeout(Some(patience)).context("cannot limit waiting")?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").context("cannot ask")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("no answer")?;
    let at = answer.windows(4).position(|end| end == b"\r\n\r\n").context("the answer has no head")?;
    Ok(answer.split_off(at + 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn the_http_server_gives_what_it_has() {
        let bytes = Arc::new(vec![7; 100_000]);
        let server = http("127.0.0.1:0", Content::Bytes(bytes.clone())).unwrap();
        assert_eq!(get(server.address(), "/any", SOON).unwrap(), *bytes);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "text").unwrap();
        let server = http("127.0.0.1:0", Content::Folder(directory.path().to_owned())).unwrap();
        assert_eq!(get(server.address(), "/file", SOON).unwrap(), b"text");
        assert_eq!(get(server.address(), "http://host/file", SOON).unwrap(), b"text");
        assert_eq!(get(server.address(), "/../etc/passwd", SOON).unwrap(), b"");
        assert_eq!(server.connections(), 3);
    }

    #[test]
    fn the_name_server_knows_one_name() {
        let mut query = vec![7, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend(b"\x01a\x04test\x00\x00\x01\x00\x01");
        let answer = dns_answer(&query, b"\x01a\x04test\x00", Ipv4Addr::new(10, 0, 2, 2)).unwrap();
        assert_eq!((&answer[..2], answer[3], answer[7]), (&[7, 9][..], 0x80, 1));
        assert!(answer.ends_with(&[10, 0, 2, 2]));
        let none = dns_answer(&query, b"\x01b\x04test\x00", Ipv4Addr::LOCALHOST).unwrap();
        assert_eq!((none[3], none[7]), (0x83, 0));
        assert_eq!(dns_answer(&[0; 9], b"\x00", Ipv4Addr::LOCALHOST), None);
    }

    #[test]
    fn the_echo_server_answers_many_at_once() {
        let server = echo("127.0.0.1:0").unwrap();
        let mut streams: Vec<_> = (0..50).map(|_| TcpStream::connect(server.address()).unwrap()).collect();
        for stream in &mut streams {
            stream.write_all(b"abcd").unwrap();
        }
        for stream in &mut streams {
            let mut back = [0; 4];
            stream.read_exact(&mut back).unwrap();
            assert_eq!(&back, b"abcd");
        }
        assert_eq!(server.most_at_once(), 50);
    }
}
