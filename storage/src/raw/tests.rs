//! The raw format against a model, its edges, and what opening refuses.

use super::*;
use crate::disk::{read_bytes, read_tracked, write_bytes, write_tracked};
use crate::error::OpenError;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const WRITE: OpenOptions = OpenOptions { read_only: false };
const READ: OpenOptions = OpenOptions { read_only: true };

/// A directory with an image of the given content.
fn image(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, content).unwrap();
    (directory, path)
}

fn content_of(disk: &dyn Disk) -> Vec<u8> {
    let mut bytes = vec![0xee; disk.capacity_bytes() as usize];
    read_bytes(disk, 0, &mut bytes).unwrap();
    bytes
}

/// One step of the random test. Positions and lengths go a little beyond the disk.
#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, pieces: Vec<usize>, fill: u8 },
    Read { offset: u64, pieces: Vec<usize> },
    Zeroes { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

const MODEL_SIZE: u64 = 40_000;

fn step() -> impl Strategy<Value = Step> {
    let offset = 0..MODEL_SIZE + 700;
    let len = prop_oneof![0..600u64, 0..20_000u64];
    let pieces = prop::collection::vec(0..3000usize, 0..8);
    prop_oneof![
        4 => (offset.clone(), pieces.clone(), any::<u8>())
            .prop_map(|(offset, pieces, fill)| Step::Write { offset, pieces, fill }),
        2 => (offset.clone(), pieces).prop_map(|(offset, pieces)| Step::Read { offset, pieces }),
        2 => (offset.clone(), len.clone(), any::<bool>())
            .prop_map(|(offset, len, unmap)| Step::Zeroes { offset, len, unmap }),
        2 => (offset, len).prop_map(|(offset, len)| Step::Discard { offset, len }),
        1 => Just(Step::Flush),
    ]
}

/// Slices of the given lengths, in order, over one piece of memory.
fn scatter<'a>(mut memory: &'a mut [u8], pieces: &[usize]) -> Vec<VolatileSlice<'a>> {
    let mut list = Vec::new();
    for len in pieces {
        let (head, tail) = memory.split_at_mut(*len);
        list.push(VolatileSlice::from(head));
        memory = tail;
    }
    list
}

/// Does one step on the disk and on the model; both must agree on the result.
fn apply(disk: &dyn Disk, model: &mut [u8], step: &Step) -> Result<(), TestCaseError> {
    let range = |offset: u64, len: u64| {
        (offset + len <= MODEL_ROUNDED).then_some(offset as usize..(offset + len) as usize)
    };
    let same = |result: Result<(), DiskError>, fits: bool| match result {
        Ok(()) => fits,
        Err(error) => !fits && error.kind() == DiskErrorKind::OutOfRange,
    };
    match step {
        Step::Write { offset, pieces, fill } => {
            let mut bytes: Vec<u8> =
                (0..pieces.iter().sum::<usize>()).map(|n| fill.wrapping_add(n as u8)).collect();
            let range = range(*offset, bytes.len() as u64);
            let result = disk.write_at(*offset, &scatter(&mut bytes, pieces));
            prop_assert!(same(result, range.is_some()));
            if let Some(range) = range {
                model[range].copy_from_slice(&bytes);
            }
        }
        Step::Read { offset, pieces } => {
            let mut bytes = vec![0xee; pieces.iter().sum()];
            let range = range(*offset, bytes.len() as u64);
            let result = disk.read_at(*offset, &scatter(&mut bytes, pieces));
            prop_assert!(same(result, range.is_some()));
            if let Some(range) = range {
                prop_assert!(bytes == model[range], "read differs");
            }
        }
        Step::Zeroes { offset, len, unmap } => {
            let range = range(*offset, *len);
            prop_assert!(same(disk.write_zeroes(*offset, *len, *unmap), range.is_some()));
            range.into_iter().for_each(|range| model[range].fill(0));
        }
        Step::Discard { offset, len } => {
            let range = range(*offset, *len);
            prop_assert!(same(disk.discard(*offset, *len), range.is_some()));
            range.into_iter().for_each(|range| model[range].fill(0));
        }
        Step::Flush => prop_assert!(disk.flush().is_ok()),
    }
    Ok(())
}

/// `MODEL_SIZE` is not whole sectors: the rounded tail takes part in the test.
const MODEL_ROUNDED: u64 = MODEL_SIZE.next_multiple_of(512);

/// Directories on different file systems: the usual one, and memory, which cannot zero ranges.
fn directories() -> Vec<PathBuf> {
    let mut list = vec![std::env::temp_dir()];
    list.extend(Some(PathBuf::from("/dev/shm")).filter(|path| path.is_dir()));
    list
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations_agrees_with_a_model(steps in prop::collection::vec(step(), 1..60)) {
        for directory in directories() {
            let file = tempfile::NamedTempFile::new_in(directory).unwrap();
            file.as_file().set_len(MODEL_SIZE).unwrap();
            let mut model = vec![0; MODEL_ROUNDED as usize];
            let disk = RawDisk::open(file.path(), WRITE).unwrap();
            prop_assert!(disk.capabilities().discard.is_some());
            for step in &steps {
                apply(&disk, &mut model, step)?;
            }
            prop_assert!(content_of(&disk) == model, "content differs");
            drop(disk);
            let reopened = RawDisk::open(file.path(), READ).unwrap();
            let end = reopened.capacity_bytes() as usize;
            prop_assert!(content_of(&reopened) == model[..end], "content differs after reopening");
        }
    }
}

/// A file that, like a block device, releases and zeroes whole blocks only.
struct BlockwiseFile(HostFile);

impl BlockwiseFile {
    const BLOCK: u64 = 4096;

    fn check(offset: u64, len: u64) -> io::Result<()> {
        if len == 0 || !offset.is_multiple_of(Self::BLOCK) || !len.is_multiple_of(Self::BLOCK) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
}

impl ImageFile for BlockwiseFile {
    fn read_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<usize> {
        self.0.read_at(offset, buffers)
    }

    fn write_at(&self, offset: u64, buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.0.write_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        Self::check(offset, len)?;
        self.0.punch_hole(offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        Self::check(offset, len)?;
        self.0.zero_range(offset, len)
    }
}

#[test]
fn ranges_that_do_not_fit_the_blocks_of_a_device_are_zeroed_exactly_and_discarded_inside() {
    const SIZE: u64 = 8 * BlockwiseFile::BLOCK;
    let geometry = RawGeometry {
        file_size: SIZE,
        logical_block_size: 4096,
        discard_granularity: Some(4096),
        range_alignment: 4096,
        read_only: false,
    };
    let ranges =
        [(0, 0), (1, 10), (4000, 200), (4095, 4098), (4096, 8192), (100, 20_000), (12_288, SIZE - 12_288)];
    for (offset, len) in ranges {
        for unmap in [true, false] {
            let file = tempfile::tempfile().unwrap();
            let disk = RawDisk::over(BlockwiseFile(HostFile::new(file)), geometry);
            let mut model = vec![7; SIZE as usize];
            write_bytes(&disk, 0, &model).unwrap();
            disk.write_zeroes(offset, len, unmap).unwrap();
            model[offset as usize..(offset + len) as usize].fill(0);
            assert!(content_of(&disk) == model, "zeroing {len} bytes at {offset}");
        }
        let disk = RawDisk::over(BlockwiseFile(HostFile::new(tempfile::tempfile().unwrap())), geometry);
        write_bytes(&disk, 0, &vec![7; SIZE as usize]).unwrap();
        disk.discard(offset, len).unwrap();
        for (index, block) in content_of(&disk).chunks(4096).enumerate() {
            let start = index as u64 * 4096;
            let inside = offset <= start && start + 4096 <= offset + len;
            assert!(block.iter().all(|b| *b == if inside { 0 } else { 7 }), "discard of {len} at {offset}");
        }
    }
}

#[test]
fn an_odd_size_is_rounded_up_and_the_tail_reads_as_zero_until_written() {
    let (_directory, path) = image(&[5; 700]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    assert_eq!(disk.capacity_bytes(), 1024);
    let expected: Vec<u8> = [vec![5; 700], vec![0; 324]].concat();
    assert_eq!(content_of(&disk), expected);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 700, "reading changes nothing");
    write_bytes(&disk, 512, &[6; 512]).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1024);
    assert_eq!(content_of(&disk), [vec![5; 512], vec![6; 512]].concat());
}

#[test]
fn an_image_truncated_behind_our_back_gives_errors_and_not_zeros() {
    let (_directory, path) = image(&[5; 4096]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
    let error = read_bytes(&disk, 512, &mut [0; 512]).unwrap_err();
    assert_eq!(error.kind(), DiskErrorKind::Io);
    assert!(error.to_string().contains("shorter than when it was opened"), "{error}");
}

#[test]
fn discarding_releases_space_on_the_host() {
    use std::os::unix::fs::MetadataExt;
    let (_directory, path) = image(&vec![5; 1 << 20]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    disk.flush().unwrap();
    let before = std::fs::metadata(&path).unwrap().blocks();
    disk.discard(0, 1 << 19).unwrap();
    let discarded = std::fs::metadata(&path).unwrap().blocks();
    disk.write_zeroes(1 << 19, 1 << 18, true).unwrap();
    let unmapped = std::fs::metadata(&path).unwrap().blocks();
    assert!(before >= discarded + 900 && discarded >= unmapped + 450, "{before} {discarded} {unmapped}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20, "the size stays");
}

#[test]
fn a_read_only_disk_refuses_every_change_but_flushes() {
    let (_directory, path) = image(&[5; 1024]);
    let disk = RawDisk::open(&path, READ).unwrap();
    let none = Capabilities { read_only: true, ..Default::default() };
    assert_eq!(disk.capabilities(), none);
    for result in [write_bytes(&disk, 0, &[1; 512]), disk.discard(0, 512), disk.write_zeroes(0, 512, true)] {
        assert_eq!(result.unwrap_err().kind(), DiskErrorKind::ReadOnly);
    }
    disk.flush().unwrap();
    assert_eq!(content_of(&disk), [5; 1024]);
}

#[test]
fn metrics_count_operations_bytes_and_errors() {
    let (_directory, path) = image(&[0; 4096]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    write_bytes(&disk, 0, &[1; 1000]).unwrap();
    read_bytes(&disk, 0, &mut [0; 300]).unwrap();
    disk.flush().unwrap();
    disk.discard(0, 512).unwrap();
    disk.write_zeroes(0, 100, false).unwrap();
    assert!(read_bytes(&disk, 4096, &mut [0; 1]).is_err());
    let expected = crate::DiskMetricsSnapshot {
        reads: 1,
        read_bytes: 300,
        writes: 1,
        written_bytes: 1000,
        flushes: 1,
        discards: 1,
        discarded_bytes: 512,
        zeroes: 1,
        zeroed_bytes: 100,
        errors: 1,
    };
    assert_eq!(disk.metrics().snapshot(), expected);
}

#[test]
fn tracked_reads_mark_the_memory_dirty() {
    use vm_memory::bitmap::{AtomicBitmap, Bitmap};
    let (_directory, path) = image(&[5; 1024]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    let memory = vm_memory::MmapRegion::<AtomicBitmap>::new(8192).unwrap();
    use vm_memory::VolatileMemory;
    let slices = [memory.get_slice(0, 512).unwrap(), memory.get_slice(4096, 512).unwrap()];
    write_tracked(&disk, 0, &slices).unwrap();
    assert!(!memory.bitmap().dirty_at(0));
    read_tracked(&disk, 0, &slices).unwrap();
    assert!(memory.bitmap().slice_at(0).dirty_at(0) && memory.bitmap().dirty_at(4096));
}

fn refusal(path: &Path, options: OpenOptions) -> String {
    let text = RawDisk::open(path, options).unwrap_err().to_string();
    assert!(!text.contains('\n'), "one line: {text}");
    text
}

#[test]
fn what_cannot_be_opened_is_refused_with_one_line_that_names_it() {
    let (directory, path) = image(b"");
    let shown = path.display();
    let cases = [
        (path.clone(), format!("disk image '{shown}' is empty; give an image with")),
        (path.with_extension("none"), "does not exist; create it or correct the path".to_owned()),
        (path.join("below"), "does not exist; create it or correct the path".to_owned()),
        (directory.path().to_owned(), "is a directory; give the path of an image file".to_owned()),
        (PathBuf::from("/dev/null"), "is neither a regular file nor a block device".to_owned()),
    ];
    for (path, expected) in cases {
        for options in [WRITE, READ] {
            let text = refusal(&path, options);
            assert!(text.contains(&expected) && text.contains(&*path.to_string_lossy()), "{text}");
        }
    }
    assert!(!path.with_extension("none").exists(), "nothing is created");
}

#[test]
fn a_pipe_is_refused_without_waiting_for_its_other_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert!(refusal(&path, READ).contains("neither a regular file nor a block device"));
}

#[test]
fn missing_permission_is_told_with_what_was_wanted() {
    let (_directory, path) = image(&[0; 512]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    let error = match RawDisk::open(&path, WRITE) {
        Err(error) => error.to_string(),
        // The superuser may open everything; then only the text can be checked.
        Ok(_) => OpenError::PermissionDenied { path: path.clone(), read_only: false }.to_string(),
    };
    let start = format!("no permission to read and write disk image '{}'; change", path.display());
    assert!(error.starts_with(&start) && error.ends_with("or open it read-only"), "{error}");
}

#[test]
fn a_writer_excludes_everybody_and_readers_get_along() {
    let (_directory, path) = image(&[0; 512]);
    let writer = RawDisk::open(&path, WRITE).unwrap();
    let expected = format!(
        "disk image '{}' is in use by another process (pid {}); end that use, or open the image read-only in both",
        path.display(),
        std::process::id()
    );
    assert_eq!(refusal(&path, WRITE), expected);
    assert_eq!(refusal(&path, READ), expected);
    drop(writer);
    let readers = [RawDisk::open(&path, READ).unwrap(), RawDisk::open(&path, READ).unwrap()];
    assert_eq!(refusal(&path, WRITE), expected);
    drop(readers);
    RawDisk::open(&path, WRITE).unwrap();
}

#[test]
fn threads_share_one_disk() {
    let (_directory, path) = image(&vec![0; 64 << 10]);
    let disk = RawDisk::open(&path, WRITE).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let disk = &disk;
            scope.spawn(move || {
                for n in 0..64u64 {
                    let offset = (n * 4 + u64::from(thread)) * 256;
                    write_bytes(disk, offset, &[thread + 1; 256]).unwrap();
                }
                disk.flush().unwrap();
            });
        }
    });
    for (index, piece) in content_of(&disk).chunks(256).enumerate() {
        assert!(piece.iter().all(|b| usize::from(*b) == index % 4 + 1));
    }
    assert_eq!(disk.metrics().snapshot().written_bytes, 64 << 10);
}
