//! x87 control instructions and the environment formats of FNSTENV, FLDENV, FNSAVE and FRSTOR
//! (Intel SDM vol. 1, 8.1.10): 14 or 28 bytes by operand size, protected or real by mode.

use atoll_machine::backend::CpuIo;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::state::status;
use super::{check_pending, operand, require_x87};
use crate::access::Access;
use crate::cpu::{Cpu, XsaveArea, control as cr};
use crate::exception::{Exception, Outcome};

/// Bits of the control word that exist; bit 6 always reads as 1.
const FCW_BITS: u16 = 0x1f3f;
const FCW_ONE: u16 = 0x40;
/// What FNCLEX leaves of the status word.
const CLEARED: u16 = 0x7f00;

/// WAIT, FNINIT, FNCLEX, FNSTCW, FLDCW, FNSTSW.
pub(super) fn control(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    if instruction.mnemonic() == Mnemonic::Wait {
        let both = cr::CR0_MP | cr::CR0_TS;
        if cpu.cr0 & both == both {
            return Err(Exception::NM);
        }
        return check_pending(cpu);
    }
    require_x87(cpu)?;
    match instruction.mnemonic() {
        Mnemonic::Fninit => {
            cpu.xsave.x87_init();
            (cpu.fpu.fcs, cpu.fpu.fds) = (0, 0);
            Ok(())
        }
        Mnemonic::Fnclex => {
            cpu.xsave.set_fsw(cpu.xsave.fsw() & CLEARED);
            Ok(())
        }
        Mnemonic::Fldcw => {
            check_pending(cpu)?;
            let value = u16::from_le_bytes(operand::read(cpu, io, instruction, 1)?);
            cpu.xsave.set_fcw(value & FCW_BITS | FCW_ONE);
            cpu.xsave.update_summary();
            Ok(())
        }
        Mnemonic::Fnstcw => {
            let value = cpu.xsave.fcw().to_le_bytes();
            operand::write(cpu, io, instruction, 1, &value)
        }
        _ if instruction.op0_kind() == OpKind::Register => {
            cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(cpu.xsave.fsw());
            Ok(())
        }
        _ => {
            let value = cpu.xsave.fsw().to_le_bytes();
            operand::write(cpu, io, instruction, 1, &value)
        }
    }
}

/// FNSTENV, FLDENV, FNSAVE, FRSTOR.
pub(super) fn environment(cpu: &mut Cpu, io: &dyn CpuIo, instruction: &Instruction) -> Outcome {
    require_x87(cpu)?;
    let wide = matches!(
        instruction.code(),
        Code::Fnstenv_m28byte | Code::Fldenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
    );
    let length = if wide { 28 } else { 14 };
    let registers = matches!(instruction.mnemonic(), Mnemonic::Fnsave | Mnemonic::Frstor);
    let total = if registers { length + 80 } else { length };
    let mut image = [0; 108];
    let image = &mut image[..total];
    if matches!(instruction.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) {
        Environment::of(cpu).encode(&mut image[..length], wide, cpu.mode.protected);
        for (i, register) in image[length..].chunks_exact_mut(10).enumerate() {
            register.copy_from_slice(&cpu.xsave.st(i));
        }
        let linear = operand::linear(cpu, instruction, total as u64, 1, Access::Write)?;
        cpu.write_bytes(io, linear, image, Access::Write)?;
        if registers {
            cpu.xsave.x87_init();
            (cpu.fpu.fcs, cpu.fpu.fds) = (0, 0);
        } else {
            cpu.xsave.set_fcw(cpu.xsave.fcw() | status::EXCEPTIONS);
            cpu.xsave.update_summary();
        }
        return Ok(());
    }
    check_pending(cpu)?;
    let linear = operand::linear(cpu, instruction, total as u64, 1, Access::Read)?;
    cpu.read_bytes(io, linear, image, Access::Read)?;
    Environment::decode(&image[..length], wide, cpu.mode.protected).load(cpu);
    for (i, register) in image[length..].chunks_exact(10).enumerate() {
        let mut value = [0; 10];
        value.copy_from_slice(register);
        cpu.xsave.set_st(i, value);
    }
    Ok(())
}

/// The environment with full tags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Environment {
    control: u16,
    status: u16,
    tags: u16,
    opcode: u16,
    ip: u32,
    cs: u16,
    dp: u32,
    ds: u16,
}

impl Environment {
    fn of(cpu: &Cpu) -> Self {
        let area = &cpu.xsave;
        let real = !cpu.mode.protected;
        let pointer = |offset: u64, selector: u16| {
            let base = if real { u32::from(selector) << 4 } else { 0 };
            (offset as u32).wrapping_add(base)
        };
        Self {
            control: area.fcw(),
            status: area.fsw(),
            tags: full_tags(area),
            opcode: area.fop() & 0x7ff,
            ip: pointer(area.fip(), cpu.fpu.fcs),
            cs: cpu.fpu.fcs,
            dp: pointer(area.fdp(), cpu.fpu.fds),
            ds: cpu.fpu.fds,
        }
    }

    /// Writes the format's words; reserved upper halves are ones, as processors store them.
    fn encode(&self, out: &mut [u8], wide: bool, protected: bool) {
        let high = |pointer: u32| pointer >> 16;
        let words: [u32; 7] = if protected {
            [
                self.control.into(),
                self.status.into(),
                self.tags.into(),
                self.ip,
                u32::from(self.cs) | if wide { u32::from(self.opcode) << 16 } else { 0 },
                self.dp,
                self.ds.into(),
            ]
        } else if wide {
            let opcode = u32::from(self.opcode);
            [
                self.control.into(),
                self.status.into(),
                self.tags.into(),
                self.ip & 0xffff | 0xffff_0000,
                high(self.ip) << 12 | opcode,
                self.dp & 0xffff | 0xffff_0000,
                high(self.dp) << 12,
            ]
        } else {
            [
                self.control.into(),
                self.status.into(),
                self.tags.into(),
                self.ip,
                (high(self.ip) & 0xf) << 12 | u32::from(self.opcode),
                self.dp,
                (high(self.dp) & 0xf) << 12,
            ]
        };
        if wide {
            for (i, (chunk, word)) in out.chunks_exact_mut(4).zip(words).enumerate() {
                let fill = if i < 3 || (i == 6 && protected) { 0xffff_0000 } else { 0 };
                chunk.copy_from_slice(&(word | fill).to_le_bytes());
            }
        } else {
            for (chunk, word) in out.chunks_exact_mut(2).zip(words) {
                chunk.copy_from_slice(&(word as u16).to_le_bytes());
            }
        }
    }

    fn decode(image: &[u8], wide: bool, protected: bool) -> Self {
        let mut words = [0u32; 7];
        if wide {
            for (word, chunk) in words.iter_mut().zip(image.chunks_exact(4)) {
                *word = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            }
        } else {
            for (word, chunk) in words.iter_mut().zip(image.chunks_exact(2)) {
                *word = u16::from_le_bytes([chunk[0], chunk[1]]).into();
            }
        }
        let [control, status, tags, ip, ip_high, dp, dp_high] = words;
        let mut environment =
            Self { control: control as u16, status: status as u16, tags: tags as u16, ..Self::default() };
        if protected {
            (environment.ip, environment.dp) = (ip, dp);
            (environment.cs, environment.ds) = (ip_high as u16, dp_high as u16);
            environment.opcode = if wide { (ip_high >> 16) as u16 & 0x7ff } else { 0 };
        } else {
            let join = |low: u32, high: u32| low & 0xffff | (high >> 12 & 0xffff) << 16;
            (environment.ip, environment.dp) = (join(ip, ip_high), join(dp, dp_high));
            environment.opcode = ip_high as u16 & 0x7ff;
        }
        environment
    }

    fn load(&self, cpu: &mut Cpu) {
        let area = &mut cpu.xsave;
        area.set_fcw(self.control & FCW_BITS | FCW_ONE);
        area.set_top(usize::from((self.status & status::TOP) >> status::TOP_SHIFT));
        area.set_fsw(self.status);
        area.set_ftw((0..8).fold(0, |tags, i| tags | u8::from(self.tags >> (2 * i) & 3 != 3) << i));
        area.set_fop(self.opcode);
        area.set_fip(self.ip.into());
        area.set_fdp(self.dp.into());
        area.update_summary();
        (cpu.fpu.fcs, cpu.fpu.fds) = (self.cs, self.ds);
    }
}

/// The two-bit tags of the eight physical registers: 0 valid, 1 zero, 2 special, 3 empty.
fn full_tags(area: &XsaveArea) -> u16 {
    let in_use = area.ftw();
    (0..8).fold(0, |tags, physical: usize| {
        let tag = if in_use >> physical & 1 == 0 {
            3
        } else {
            let value = area.st((physical + 8 - area.top()) & 7);
            let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
            let integer = value[7] & 0x80 != 0;
            let zero = value[..8].iter().all(|b| *b == 0);
            match (exponent, integer, zero) {
                (0, _, true) => 1,
                (0 | 0x7fff, ..) | (_, false, _) => 2,
                _ => 0,
            }
        };
        tags | tag << (2 * physical)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Environment = Environment {
        control: 0x37f,
        status: 0x3800,
        tags: 0x3fff,
        opcode: 0x123,
        ip: 0x1_2345,
        cs: 0x1000,
        dp: 0x2_6789,
        ds: 0x2000,
    };

    #[test]
    fn environments_survive_each_format_as_far_as_it_reaches() {
        for (wide, protected) in [(true, true), (false, true), (true, false), (false, false)] {
            let mut image = [0; 28];
            let image = &mut image[..if wide { 28 } else { 14 }];
            SAMPLE.encode(image, wide, protected);
            let back = Environment::decode(image, wide, protected);
            assert_eq!((back.control, back.status, back.tags), (0x37f, 0x3800, 0x3fff));
            let pointer = if wide || !protected { (0x1_2345, 0x2_6789) } else { (0x2345, 0x6789) };
            assert_eq!((back.ip, back.dp), pointer, "wide {wide} protected {protected}");
            assert_eq!(back.opcode, if protected && !wide { 0 } else { 0x123 });
            assert_eq!((back.cs, back.ds), if protected { (0x1000, 0x2000) } else { (0, 0) });
        }
    }
}
