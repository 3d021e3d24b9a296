//! Writer of the `newc` cpio format, the one the kernel unpacks as its initial root file system
//! (kernel documentation: "initramfs buffer format").
//!
//! An archive is a row of members: a 110-byte header of ASCII hexadecimal fields, the name with a final NUL,
//! padding to 4 bytes, the content, padding to 4 bytes. It ends with a member named `TRAILER!!!`. The output
//! depends on the members alone: inode numbers count up, times are zero, the owner is root.

/// An archive being written. Parents of a path are added as directories by themselves.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: std::collections::BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents. `path` is relative to the root, such as `dev/pts`.
    pub fn directory(&mut self, path: &str) {
        if path.is_empty() || self.directories.contains(path) {
            return;
        }
        self.parents(path);
        self.directories.insert(path.to_owned());
        self.member(path, DIRECTORY | 0o755, (0, 0), b"");
    }

    /// Adds a regular file. `mode` holds the permission bits, such as `0o755`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.member(path, REGULAR | (mode & 0o7777), (0, 0), content);
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.member(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parents(path);
        self.member(path, CHARACTER | (mode & 0o7777), (major, minor), b"");
    }

    /// Ends the archive and gives its bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = u32::MAX; // the trailer has inode 0 after the wrapping increment
        self.member("TRAILER!!!", 0, (0, 0), b"");
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn member(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.inode = self.inode.wrapping_add(1);
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: (name, mode, content) of each member.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut at = 0;
        let mut members = Vec::new();
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |i: usize| {
                let start = at + 6 + 8 * i;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[at + 110..at + 110 + name_size - 1]).unwrap().to_owned();
            let data = (at + 110 + name_size).next_multiple_of(4);
            members.push((name.clone(), mode, bytes[data..data + size].to_vec()));
            at = (data + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(at, bytes.len());
                return members;
            }
        }
    }

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.file("bin/a/tool", 0o755, b"12345");
        archive.file("bin/a/second", 0o644, b"");
        archive.symlink("bin/sh", "a/tool");
        archive.character_device("dev/console", 0o600, 5, 1);
        archive.finish()
    }

    #[test]
    fn members_come_back_with_their_modes_and_contents() {
        let expected: Vec<(String, u32, Vec<u8>)> = [
            ("bin", 0o040_755, &b""[..]),
            ("bin/a", 0o040_755, b""),
            ("bin/a/tool", 0o100_755, b"12345"),
            ("bin/a/second", 0o100_644, b""),
            ("bin/sh", 0o120_777, b"a/tool"),
            ("dev", 0o040_755, b""),
            ("dev/console", 0o020_600, b""),
            ("TRAILER!!!", 0, b""),
        ]
        .map(|(n, m, c)| (n.to_owned(), m, c.to_vec()))
        .to_vec();
        assert_eq!(read(&sample()), expected);
    }

    #[test]
    fn the_same_members_give_the_same_bytes() {
        assert_eq!(sample(), sample());
    }

    #[test]
    fn cpio_lists_the_archive() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let Ok(mut child) =
            Command::new("cpio").args(["-t", "--quiet"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()
        else {
            return; // cpio is not installed: the round trip above stands alone
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap(),
            "bin\nbin/a\nbin/a/tool\nbin/a/second\nbin/sh\ndev\ndev/console\n"
        );
    }
}
