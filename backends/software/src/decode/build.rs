//! Finding a block the slow way: fetch translation, revalidation, decoding.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction};

use super::{
    Block, Blocks, MAX_BLOCK_BYTES, MAX_BYTES, MAX_OPS, NONE, Op, PageVersion, bucket_of, model, select,
};
use crate::access::is_canonical;
use crate::cpu::Cpu;
use crate::exception::{Exception, Outcome};
use crate::execute::rare;
use crate::mmu::raw::{self, HostAddress};

const MAX_INSTRUCTION: usize = 15;

impl Blocks {
    /// The block at the current RIP: from the index, or decoded now. Faults as the fetch does.
    pub(crate) fn find(&mut self, cpu: &mut Cpu, io: &dyn atoll_machine::backend::CpuIo) -> Outcome<u32> {
        let linear = cpu.fetch_linear();
        if cpu.mode.bits == 64 {
            if !is_canonical(linear) {
                return Err(Exception::GP0);
            }
        } else if cpu.rip > cpu.exec.code_limit {
            return Err(Exception::GP0);
        }
        if self.footprint() > MAX_BYTES {
            self.clear();
        }
        let fetch = cpu.translate_fetch(linear)?;
        if fetch.host.get() == 0 {
            return self.build_from_device(cpu, io, linear);
        }
        let host = fetch.host.plus(linear & 0xfff);
        let key = cpu.exec.key;
        let found = self.in_bucket(host, key);
        if let Some(at) = found
            && self.revalidate(cpu, at, linear)?
        {
            self.learn(linear, cpu.fetch_context(linear), at);
            return Ok(at);
        }
        if let Some(at) = found {
            self.unlink(at);
        }
        cpu.mmu.note_decoded(fetch.frame >> 12);
        let at = self.build(cpu, io, linear, fetch.host, fetch.frame)?;
        self.learn(linear, cpu.fetch_context(linear), at);
        Ok(at)
    }

    /// Whether the bytes that block `at` was decoded from are still there; adopts the pages' versions if so.
    fn revalidate(&mut self, cpu: &mut Cpu, at: u32, linear: u64) -> Outcome<bool> {
        let Some(block) = self.blocks.get(at as usize).copied() else { return Ok(false) };
        if block.second == NONE && block.page.current() {
            return Ok(true);
        }
        let start = block.bytes_at as usize;
        let kept = self.bytes[start..start + block.bytes as usize].to_vec();
        let first = kept.len().min(0x1000 - (block.host.get() & 0xfff) as usize);
        let page = self.protect(block.page);
        let mut now = [0; MAX_BLOCK_BYTES + 16];
        raw::copy_out(block.host, &mut now[..first]);
        let mut second = None;
        if block.second != NONE {
            let fetch = cpu.translate_fetch(cpu.linear_page_after(linear))?;
            let Some(kept_second) = self.seconds.get(block.second as usize).copied() else {
                return Ok(false);
            };
            if fetch.host != kept_second.page {
                return Ok(false);
            }
            second = Some(self.protect(kept_second));
            raw::copy_out(kept_second.page, &mut now[first..kept.len()]);
        }
        if now[..kept.len()] != kept[..] {
            return Ok(false);
        }
        if let (Some(second), Some(slot)) = (second, self.seconds.get_mut(block.second as usize)) {
            *slot = second;
        }
        if let Some(block) = self.blocks.get_mut(at as usize) {
            block.page = page;
        }
        Ok(true)
    }

    fn protect(&self, page: PageVersion) -> PageVersion {
        let seen =
            self.rams.get(page.ram as usize).map_or(0, |r| r.protect_code(u64::from(page.frame_in_ram)));
        PageVersion { seen, ..page }
    }

    /// Announces the page at `host` as code. `None` if the frame is no longer memory.
    fn page_version(&mut self, cpu: &Cpu, host: HostAddress, frame: u64) -> Option<PageVersion> {
        let ram = cpu.mmu.ram(frame, 0x1000)?;
        let page = ram.offset >> 12;
        let version = std::ptr::from_ref(ram.block.code_versions().get(page as usize)?) as u64;
        let index = self.ram_index(ram.block);
        let page = PageVersion {
            version: HostAddress::of_counter(version),
            seen: 0,
            page: host,
            ram: index,
            frame_in_ram: page as u32,
        };
        Some(self.protect(page))
    }

    fn build(
        &mut self,
        cpu: &mut Cpu,
        io: &dyn atoll_machine::backend::CpuIo,
        linear: u64,
        page_host: HostAddress,
        frame: u64,
    ) -> Outcome<u32> {
        let Some(page) = self.page_version(cpu, page_host, frame) else {
            return self.build_from_device(cpu, io, linear);
        };
        let host = page_host.plus(linear & 0xfff);
        let mut bytes = [0; MAX_BLOCK_BYTES + 16];
        let first = (0x1000 - (linear & 0xfff) as usize).min(MAX_BLOCK_BYTES);
        raw::copy_out(host, &mut bytes[..first]);
        let mut block = self.empty_block(cpu, page, host);
        let taken = self.decode_run(cpu, &bytes[..first]);
        if let Taken::Run { count, bytes: used } = taken {
            return Ok(self.finish(block, count, &bytes[..used]));
        }
        // The very first instruction goes on in the next page.
        let next = cpu.linear_page_after(linear);
        let fetch = cpu.translate_fetch(next)?;
        if fetch.host.get() == 0 {
            return self.build_from_device(cpu, io, linear);
        }
        let Some(second) = self.page_version(cpu, fetch.host, fetch.frame) else {
            return self.build_from_device(cpu, io, linear);
        };
        raw::copy_out(fetch.host, &mut bytes[first..first + MAX_INSTRUCTION]);
        let used = self.decode_one(cpu, &bytes[..first + MAX_INSTRUCTION]);
        block.second = self.seconds.len() as u32;
        self.seconds.push(second);
        Ok(self.finish(block, 1, &bytes[..used]))
    }

    /// Code outside RAM and ROM: one instruction, read through the device, decoded anew every time.
    fn build_from_device(
        &mut self,
        cpu: &mut Cpu,
        io: &dyn atoll_machine::backend::CpuIo,
        linear: u64,
    ) -> Outcome<u32> {
        let mut bytes = [0; 2 * MAX_INSTRUCTION + 2];
        let mut have = 0;
        let mut at = linear;
        while have < MAX_INSTRUCTION {
            let rest = (0x1000 - (at & 0xfff) as usize).min(MAX_INSTRUCTION - have);
            // A whole instruction before the page's end needs nothing from the next page.
            if have > 0 && !self.needs_more(cpu, &bytes[..have]) {
                break;
            }
            let frame = cpu.translate_fetch(at)?.frame;
            cpu.physical_read(io, frame | (at & 0xfff), &mut bytes[have..have + rest]);
            have += rest;
            at = cpu.linear_page_after(at);
        }
        let used = self.decode_one(cpu, &bytes[..have.max(MAX_INSTRUCTION)]);
        let page = PageVersion {
            version: HostAddress::default(),
            seen: 0,
            page: HostAddress::default(),
            ram: NONE,
            frame_in_ram: 0,
        };
        let mut block = self.empty_block(cpu, page, HostAddress::default());
        block.start = self.ops.len() as u32 - 1;
        block.count = 1;
        block.bytes = used as u16;
        self.blocks.push(block);
        Ok(self.blocks.len() as u32 - 1)
    }

    fn needs_more(&self, cpu: &Cpu, bytes: &[u8]) -> bool {
        let mut decoder = decoder(cpu, bytes);
        let _ = decoder.decode();
        decoder.last_error() == DecoderError::NoMoreBytes
    }

    fn empty_block(&self, cpu: &Cpu, page: PageVersion, host: HostAddress) -> Block {
        Block {
            page,
            second: NONE,
            start: self.ops.len() as u32,
            count: 0,
            bytes: 0,
            bytes_at: 0,
            host,
            key: cpu.exec.key,
            next: NONE,
        }
    }

    fn finish(&mut self, mut block: Block, count: usize, bytes: &[u8]) -> u32 {
        let at = self.blocks.len() as u32;
        let bucket = bucket_of(block.host);
        block.count = count as u16;
        block.bytes = bytes.len() as u16;
        block.bytes_at = self.bytes.len() as u32;
        block.next = self.buckets[bucket];
        self.bytes.extend_from_slice(bytes);
        self.blocks.push(block);
        self.buckets[bucket] = at;
        at
    }

    /// Decodes a run of instructions that lies wholly in `bytes`.
    pub(super) fn decode_run(&mut self, cpu: &Cpu, bytes: &[u8]) -> Taken {
        let mut decoder = decoder(cpu, bytes);
        let mut instruction = Instruction::default();
        let (mut count, mut used) = (0, 0);
        while count < MAX_OPS && used < bytes.len() {
            decoder.set_ip(0);
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                break;
            }
            let (mut op, ends) = self.digest(cpu, &instruction, &bytes[used..]);
            op.offset = used as u16;
            op.len = instruction.len() as u8;
            self.ops.push(op);
            count += 1;
            used += instruction.len();
            if ends {
                break;
            }
        }
        if count == 0 { Taken::NeedsMore } else { Taken::Run { count, bytes: used } }
    }

    /// Decodes the one instruction at the start of `bytes`, of which at least 15 are there.
    pub(super) fn decode_one(&mut self, cpu: &Cpu, bytes: &[u8]) -> usize {
        let mut decoder = decoder(cpu, bytes);
        let instruction = decoder.decode();
        let (mut op, _) = self.digest(cpu, &instruction, bytes);
        op.len = instruction.len() as u8;
        self.ops.push(op);
        instruction.len()
    }

    /// The op of an instruction, and whether it ends a block.
    fn digest(&mut self, cpu: &Cpu, instruction: &Instruction, bytes: &[u8]) -> (Op, bool) {
        let exchange = exchange_not_pause(cpu, instruction, bytes);
        let instruction = exchange.as_ref().unwrap_or(instruction);
        if instruction.code() == Code::INVALID {
            let too_long = exceeds_length(cpu, bytes);
            return (Op::new(if too_long { rare::too_long } else { rare::undefined }), true);
        }
        select::select(cpu, instruction, &mut self.instructions)
    }
}

/// F3 90 with REX.B is XCHG R8 with the accumulator, not PAUSE as the decoder has it.
fn exchange_not_pause(cpu: &Cpu, instruction: &Instruction, bytes: &[u8]) -> Option<Instruction> {
    let rex = *bytes.get(instruction.len().checked_sub(2)?)?;
    if instruction.code() != Code::Pause || cpu.mode.bits != 64 || rex & 0xf1 != 0x41 {
        return None;
    }
    let plain: Vec<u8> = bytes.iter().take(instruction.len()).copied().filter(|b| *b != 0xf3).collect();
    let mut exchange = decoder(cpu, &plain).decode();
    exchange.set_len(instruction.len());
    Some(exchange)
}

pub(super) enum Taken {
    Run { count: usize, bytes: usize },
    NeedsMore,
}

fn decoder<'a>(cpu: &Cpu, bytes: &'a [u8]) -> Decoder<'a> {
    let options = DecoderOptions::FORCE_RESERVED_NOP | model::decoder_options(&cpu.shared.model);
    Decoder::new(cpu.mode.bits, bytes, options)
}

/// Whether undecodable bytes are undecodable because the instruction passes 15 bytes (#GP, not #UD): it
/// decodes once redundant legacy prefixes are taken away, or consists of nothing but prefixes.
fn exceeds_length(cpu: &Cpu, bytes: &[u8]) -> bool {
    let long = cpu.mode.bits == 64;
    let is_prefix = |b: u8| {
        matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3)
            || (long && b & 0xf0 == 0x40)
    };
    let prefixes = bytes.iter().take_while(|&&b| is_prefix(b)).count();
    if prefixes >= MAX_INSTRUCTION {
        return true;
    }
    if prefixes < 2 {
        return false;
    }
    let mut short: Vec<u8> = Vec::with_capacity(bytes.len());
    for (at, &b) in bytes[..prefixes].iter().enumerate() {
        // A REX prefix counts only right before the opcode.
        let idle = long && b & 0xf0 == 0x40 && at + 1 < prefixes;
        if !idle && !short.contains(&b) {
            short.push(b);
        }
    }
    let removed = prefixes - short.len();
    short.extend_from_slice(&bytes[prefixes..]);
    // What lies beyond the page's end decides nothing: the instruction is too long without it.
    short.resize(short.len() + MAX_INSTRUCTION, 0);
    let instruction = decoder(cpu, &short).decode();
    instruction.code() != Code::INVALID && instruction.len() + removed > MAX_INSTRUCTION
}
