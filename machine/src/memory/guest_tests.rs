//! Tests of [`super`] with the consumers it is for: vm-memory's helpers and a virtio queue.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestMemoryBackend};

use super::super::{PAGE_SIZE, RamBlock};
use super::*;

fn memory() -> (GuestMemory, Arc<RamBlock>) {
    let space = AddressSpace::new();
    let block = RamBlock::new_shared("ram", 16 * PAGE_SIZE).unwrap();
    space.map_ram(0, &block, 0, 8 * PAGE_SIZE, 0).unwrap();
    space.map_ram(0x10_0000, &block, 8 * PAGE_SIZE, 8 * PAGE_SIZE, 0).unwrap();
    (GuestMemory::new(&space), block)
}

#[test]
fn objects_and_slices_reach_ram_and_are_noted() {
    let (mem, block) = memory();
    let mut log = block.dirty_log();
    mem.write_obj(0x1122_3344_5566_7788u64, 0x10_0000).unwrap();
    assert_eq!(mem.read_obj::<u32>(GuestAddress(0x10_0004)).unwrap(), 0x1122_3344);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [8]);
    let slices = mem.slices(0x7000, PAGE_SIZE).unwrap();
    assert_eq!(slices.iter().map(|s| s.len()).collect::<Vec<_>>(), [4096]);
    slices[0].write_slice(&[1; 8], 0).unwrap();
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [7]);
    assert!(mem.slices(0x7000, PAGE_SIZE + 1).is_err());
    assert!(mem.read_obj::<u64>(0x8000).is_err());
}

#[test]
fn a_slice_keeps_unplugged_memory_alive() {
    let space = AddressSpace::new();
    let block = RamBlock::new_shared("dimm", PAGE_SIZE).unwrap();
    let id = space.map_ram(0, &block, 0, PAGE_SIZE, 0).unwrap();
    let mem = GuestMemory::new(&space);
    let slices = mem.slices(0, 16).unwrap();
    space.unmap(id);
    drop((block, space, mem));
    slices[0].write_slice(&[7; 16], 0).unwrap();
    let mut back = [0; 16];
    slices[0].read_slice(&mut back, 0).unwrap();
    assert_eq!(back, [7; 16]);
}

/// What a kernel loader does, generic over vm-memory's trait.
fn load<M: GuestMemoryBackend>(mem: &M, at: u64) {
    let (region, offset) = mem.to_region_addr(GuestAddress(at)).unwrap();
    region.write_slice(b"kernel", offset).unwrap();
    assert_eq!(mem.num_regions(), 2);
}

#[test]
fn a_snapshot_is_a_vm_memory_backend() {
    let (mem, block) = memory();
    let mut log = block.dirty_log();
    let snapshot = mem.snapshot();
    load(&*snapshot, 0x10_1000);
    snapshot.write_slice(b"!", GuestAddress(0x10_1006)).unwrap();
    let mut text = [0; 7];
    mem.read(0x10_1000, &mut text).unwrap();
    assert_eq!(&text, b"kernel!");
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [9]);
    assert!(snapshot.find_region(GuestAddress(0x8000)).is_none());
    assert_eq!(snapshot.last_addr(), GuestAddress(0x10_7fff));
}

#[test]
fn a_virtio_queue_runs_over_the_handle_and_its_writes_are_noted() {
    let (mem, block) = memory();
    let (table, avail, used) = (0x1000u64, 0x2000u64, 0x3000u64);
    // One writable descriptor of 64 bytes at 0x10_0000, made available.
    mem.write_obj(0x10_0000u64, table).unwrap();
    mem.write_obj(64u32, table + 8).unwrap();
    mem.write_obj(2u16, table + 12).unwrap();
    mem.write_obj(0u16, avail + 4).unwrap();
    mem.write_obj(1u16, avail + 2).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(table as u32), Some(0));
    queue.set_avail_ring_address(Some(avail as u32), Some(0));
    queue.set_used_ring_address(Some(used as u32), Some(0));
    queue.set_size(16);
    queue.set_ready(true);
    assert!(queue.is_valid(&mem));
    let mut log = block.dirty_log();
    let chain = queue.pop_descriptor_chain(&mem).unwrap();
    let head = chain.head_index();
    let mut writer = chain.writer(&mem).unwrap();
    std::io::Write::write_all(&mut writer, b"hello").unwrap();
    queue.add_used(&mem, head, 5).unwrap();
    let mut text = [0; 5];
    mem.read(0x10_0000, &mut text).unwrap();
    assert_eq!(&text, b"hello");
    assert_eq!(mem.read_obj::<u16>(used + 2).unwrap(), 1);
    assert_eq!(log.take().iter().collect::<Vec<_>>(), [3, 8]);
}

#[test]
fn vm_memory_accesses_that_leave_ram_are_errors() {
    let (mem, _block) = memory();
    assert!(Bytes::write_slice(&mem, &[0; 8], GuestAddress(0x7ffc)).is_err());
    assert!(vm_memory::GuestMemory::check_range(&mem, GuestAddress(0), 0x8000, Permissions::Read));
    assert!(!vm_memory::GuestMemory::check_range(&mem, GuestAddress(0), 0x8001, Permissions::Read));
    assert!(Bytes::load::<u32>(&mem, GuestAddress(u64::MAX), std::sync::atomic::Ordering::SeqCst).is_err());
}
