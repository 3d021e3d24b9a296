//! The decoder alone, for tests and fuzz targets: bytes in, lengths out.

use super::build::Taken;
use super::{Blocks, MAX_OPS};
use crate::cpu::Cpu;

/// Bytes that are always there when a single instruction is decoded.
const ROOM: usize = 15;

/// A decoder without memory around it. Its answers depend on the mode and the model of the [`Cpu`] only.
#[derive(Default)]
pub struct Probe {
    blocks: Box<Blocks>,
}

impl Probe {
    /// Lengths of the instructions of the block at the start of `bytes`, which ends before the first one that
    /// needs more bytes.
    pub fn lengths(&mut self, cpu: &Cpu, bytes: &[u8]) -> Vec<usize> {
        self.blocks.clear();
        match self.blocks.decode_run(cpu, bytes) {
            Taken::NeedsMore => Vec::new(),
            Taken::Run { count, bytes: used } => {
                let ops = &self.blocks.ops;
                assert!(count == ops.len() && count <= MAX_OPS, "{count} operations counted");
                let mut next = 0;
                for op in ops {
                    assert_eq!(usize::from(op.offset), next, "operations follow each other");
                    next += usize::from(op.len);
                }
                assert_eq!(next, used, "the block is as long as its operations");
                ops.iter().map(|op| op.len.into()).collect()
            }
        }
    }

    /// Length of the one instruction at the start of `bytes`, as where it straddles pages or lies in a device;
    /// zeros follow `bytes`.
    pub fn single(&mut self, cpu: &Cpu, bytes: &[u8]) -> usize {
        self.blocks.clear();
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().max(ROOM), 0);
        self.blocks.decode_one(cpu, &padded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::Machine;

    #[test]
    fn lengths_are_those_of_the_instructions() {
        let (machine, mut probe) = (Machine::long(1), Probe::default());
        // NOP; MOV RAX, imm32 (cut off one byte early); JMP ends a block.
        let code = [0x90, 0x48, 0xc7, 0xc0, 1, 2, 3, 4];
        assert_eq!(probe.lengths(&machine.cpu, &code), [1, 7]);
        assert_eq!(probe.lengths(&machine.cpu, &code[..7]), [1]);
        assert!(probe.lengths(&machine.cpu, &code[..0]).is_empty());
        assert_eq!(probe.lengths(&machine.cpu, &[0x90, 0xeb, 0xfe, 0x90]), [1, 2]);
        assert_eq!(probe.single(&machine.cpu, &code[1..7]), 7);
    }

    #[test]
    fn no_instruction_is_longer_than_15_bytes() {
        let (machine, mut probe) = (Machine::long(1), Probe::default());
        let mut code = [0x66; 40];
        code[30] = 0x90;
        assert!(probe.single(&machine.cpu, &code) <= 15);
        assert!(probe.lengths(&machine.cpu, &code).iter().all(|n| *n <= 15));
    }
}
