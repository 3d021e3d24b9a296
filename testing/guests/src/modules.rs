//! Kernel modules: which ones a wish needs, in which order, decompressed.
//!
//! A kernel package carries no `modules.dep` (installing it would generate that file), so the order comes from
//! the modules themselves: section `.modinfo` of the ELF file holds NUL-separated `key=value` strings, among
//! them `depends=a,b`. Distributions compress modules with xz or zstd; the kernel's loader for the initial root
//! file system takes plain files only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::{Error, Result};

/// Longest module that is read, decompressed: no module of a distribution comes near.
const MAX_MODULE_BYTES: u64 = 64 << 20;

/// A module, ready to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Name with underscores, as `lsmod` shows it.
    pub name: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// The modules under `modules_dir` named by `wanted` and everything they depend on, each after its
/// dependencies. Names that the kernel has built in, or does not have at all, are skipped: which drivers are
/// modules differs from kernel to kernel.
///
/// # Errors
/// [`Error::Io`] if the directory cannot be read; [`Error::Module`] for a module that cannot be understood.
pub fn closure(modules_dir: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut index = BTreeMap::new();
    index_directory(modules_dir, &mut index)?;
    let mut loaded = BTreeSet::new();
    let mut order = Vec::new();
    for name in wanted {
        visit(&normal_name(name), &index, &mut loaded, &mut order)?;
    }
    Ok(order)
}

fn visit(
    name: &str,
    index: &BTreeMap<String, PathBuf>,
    loaded: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    let Some(path) = index.get(name) else {
        return Ok(());
    };
    if !loaded.insert(name.to_owned()) {
        return Ok(());
    }
    let bytes = read(path)?;
    for dependency in depends(path, &bytes)? {
        visit(&dependency, index, loaded, order)?;
    }
    order.push(Module { name: name.to_owned(), bytes });
    Ok(())
}

fn index_directory(directory: &Path, index: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::io("read", directory))? {
        let entry = entry.map_err(Error::io("read", directory))?;
        let path = entry.path();
        if entry.file_type().map_err(Error::io("read", &path))?.is_dir() {
            index_directory(&path, index)?;
        } else if let Some(stem) = module_stem(&entry.file_name().to_string_lossy()) {
            index.insert(normal_name(stem), path);
        }
    }
    Ok(())
}

fn module_stem(file_name: &str) -> Option<&str> {
    [".ko", ".ko.xz", ".ko.zst"].iter().find_map(|suffix| file_name.strip_suffix(suffix))
}

/// The kernel treats `-` and `_` in module names alike.
fn normal_name(name: &str) -> String {
    name.replace('-', "_")
}

/// Reads a module and decompresses it if its name says so.
fn read(path: &Path) -> Result<Vec<u8>> {
    let file = fs::File::open(path).map_err(Error::io("open", path))?;
    let bad = |reason: String| Error::Module { path: path.to_path_buf(), reason };
    let mut bytes = Vec::new();
    let result = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => {
            let file = std::io::BufReader::new(file);
            lzma_rust2::XzReader::new(file, true).take(MAX_MODULE_BYTES).read_to_end(&mut bytes)
        }
        Some("zst") => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(file).map_err(|e| bad(e.to_string()))?;
            decoder.take(MAX_MODULE_BYTES).read_to_end(&mut bytes)
        }
        _ => file.take(MAX_MODULE_BYTES).read_to_end(&mut bytes),
    };
    result.map_err(|e| bad(e.to_string()))?;
    Ok(bytes)
}

/// Value of `depends=` in the module's `.modinfo` section.
fn depends(path: &Path, bytes: &[u8]) -> Result<Vec<String>> {
    let bad = |reason: &str| Error::Module { path: path.to_path_buf(), reason: reason.to_owned() };
    let file = object::File::parse(bytes).map_err(|_| bad("is not an ELF file"))?;
    let section = file.section_by_name(".modinfo").ok_or_else(|| bad("has no .modinfo section"))?;
    let data = section.data().map_err(|_| bad("has a .modinfo section outside the file"))?;
    let value = data.split(|b| *b == 0).find_map(|field| field.strip_prefix(b"depends="));
    let text = String::from_utf8_lossy(value.unwrap_or_default()).into_owned();
    Ok(text.split(',').filter(|n| !n.is_empty()).map(normal_name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF64 relocatable file with a `.modinfo` section: header, names, contents, three section
    /// headers (ELF-64 object file format, chapters "file header" and "sections").
    fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let names_at = 64u64;
        let info_at = names_at + names.len() as u64;
        let table_at = (info_at + modinfo.len() as u64).next_multiple_of(8);
        let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend([1, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0u64, 0, table_at] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]);
        file.extend(names);
        file.extend(modinfo);
        file.resize(table_at as usize, 0);
        let mut section = |name: u32, kind: u32, at: u64, size: u64| {
            file.extend(name.to_le_bytes());
            file.extend(kind.to_le_bytes());
            for word in [0, 0, at, size, 0, 1, 0] {
                file.extend(u64::to_le_bytes(word));
            }
        };
        section(0, 0, 0, 0);
        section(1, 1, info_at, modinfo.len() as u64);
        section(10, 3, names_at, names.len() as u64);
        file
    }

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("kernel/drivers/x");
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("virtio_pci.ko"), module(b"license=GPL\0depends=virtio-ring,virtio\0name=p\0"))
            .unwrap();
        fs::write(deep.join("virtio-ring.ko"), module(b"depends=virtio\0")).unwrap();
        fs::write(deep.join("virtio.ko"), module(b"depends=\0")).unwrap();
        fs::write(deep.join("unrelated.ko"), b"not an ELF file").unwrap();
        dir
    }

    fn names(modules: &[Module]) -> Vec<&str> {
        modules.iter().map(|m| m.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree();
        let modules = closure(dir.path(), &["virtio-pci", "virtio_ring"]).unwrap();
        assert_eq!(names(&modules), ["virtio", "virtio_ring", "virtio_pci"]);
    }

    #[test]
    fn built_in_and_unknown_names_are_skipped() {
        let dir = tree();
        assert_eq!(names(&closure(dir.path(), &["ext4", "virtio"]).unwrap()), ["virtio"]);
    }

    #[test]
    fn a_file_that_is_no_module_is_an_error_that_names_it() {
        let dir = tree();
        let error = closure(dir.path(), &["unrelated"]).unwrap_err().to_string();
        assert!(error.contains("unrelated.ko") && error.contains("ELF"), "{error}");
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        use std::process::{Command, Stdio};
        let dir = tree();
        let plain = dir.path().join("kernel/drivers/x/virtio.ko");
        let expected = fs::read(&plain).unwrap();
        let packed = Command::new("xz").args(["--check=crc32"]).arg(&plain).stderr(Stdio::null()).status();
        if !packed.is_ok_and(|s| s.success()) {
            return; // xz is not installed: nothing to compare with
        }
        let modules = closure(dir.path(), &["virtio"]).unwrap();
        assert_eq!(modules, [Module { name: "virtio".to_owned(), bytes: expected }]);
    }

    #[test]
    fn a_damaged_compressed_module_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.ko.xz"), b"\xfd7zXZ\0rubbish").unwrap();
        fs::write(dir.path().join("b.ko.zst"), b"\x28\xb5\x2f\xfdrubbish").unwrap();
        assert!(closure(dir.path(), &["a"]).is_err());
        assert!(closure(dir.path(), &["b"]).is_err());
    }
}
