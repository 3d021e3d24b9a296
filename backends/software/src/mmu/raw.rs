//! The loads, stores and atomic operations of guest instructions on host memory.
//!
//! Every access is one host instruction of the guest's operand size, so what other vCPUs and devices see of it
//! is exactly what the architecture promises (Intel SDM vol. 3, 9.1.1), unaligned operands included. Other
//! threads store to the same bytes at any time, so nothing here makes a reference to guest memory.
#![allow(unsafe_code)]
// UNSAFETY: reads and writes guest RAM through its host address.

use std::arch::asm;

/// A host address inside the mapping of a RAM block that is alive, or inside its page flags.
///
/// The MMU makes these from a [`atoll_machine::memory::FlatView`] that it keeps alive for as long as it keeps
/// any address derived from it; an access of `n` bytes is made only where `n` bytes of the mapping follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostAddress(u64);

impl HostAddress {
    /// Promises that the address is what the type's documentation says whenever it is used.
    #[inline(always)]
    pub(crate) fn promise(address: u64) -> Self {
        Self(address)
    }
    /// The address as a number: the identity of a byte of guest memory, whatever its guest address.
    #[inline(always)]
    pub fn get(self) -> u64 {
        self.0
    }
    /// The address `by` bytes further on, in the same mapping.
    #[inline(always)]
    pub(super) fn add(self, by: u64) -> Self {
        Self(self.0.wrapping_add(by))
    }
    /// [`HostAddress::add`] for code within a page that was translated.
    #[inline(always)]
    pub(crate) fn plus(self, by: u64) -> Self {
        self.add(by)
    }
    /// Address of a page's code version in a RAM block that the caller keeps alive.
    pub(crate) fn of_counter(address: u64) -> Self {
        Self(address)
    }
    /// One relaxed load of a 32-bit counter (a page's code version).
    #[inline(always)]
    pub(crate) fn counter(self) -> u32 {
        u32::load(self)
    }
}

/// An operand size that the host moves with one instruction.
pub trait Word: Copy + Default + PartialEq + Send + 'static {
    /// Size in bytes.
    const BYTES: u64;
    /// One load.
    fn load(at: HostAddress) -> Self;
    /// One store.
    fn store(at: HostAddress, value: Self);
    /// LOCK CMPXCHG: stores `new` if memory holds `expected`; returns what memory held and whether it stored.
    fn compare_exchange(at: HostAddress, expected: Self, new: Self) -> (Self, bool);
    /// XCHG: stores `new` and returns what memory held.
    fn exchange(at: HostAddress, new: Self) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Truncated.
    fn from_u64(value: u64) -> Self;
}

macro_rules! word {
    ($t:ty, $bytes:literal, $class:ident, $acc:literal, $ptr:literal, $load:literal) => {
        impl Word for $t {
            const BYTES: u64 = $bytes;
            #[inline(always)]
            fn load(at: HostAddress) -> Self {
                let value: u64;
                // SAFETY: `HostAddress` promises readable memory; the asm reads it once.
                unsafe {
                    asm!($load, p = in(reg) at.0, v = out(reg) value,
                        options(nostack, preserves_flags, readonly));
                }
                value as $t
            }
            #[inline(always)]
            fn store(at: HostAddress, value: Self) {
                // SAFETY: `HostAddress` promises writable memory that no Rust reference covers.
                unsafe {
                    asm!(concat!("mov ", $ptr, " ptr [{p}], ", $acc), p = in(reg) at.0, v = in($class) value,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            fn compare_exchange(at: HostAddress, expected: Self, new: Self) -> (Self, bool) {
                let mut old = expected.to_u64();
                let equal: u8;
                // SAFETY: as for `store`.
                unsafe {
                    asm!(concat!("lock cmpxchg ", $ptr, " ptr [{p}], ", $acc), "sete {e}",
                        p = in(reg) at.0, v = in($class) new, e = out(reg_byte) equal, inout("rax") old,
                        options(nostack));
                }
                (old as $t, equal != 0)
            }
            #[inline(always)]
            fn exchange(at: HostAddress, new: Self) -> Self {
                let mut value = new;
                // SAFETY: as for `store`.
                unsafe {
                    asm!(concat!("xchg ", $ptr, " ptr [{p}], ", $acc), p = in(reg) at.0,
                        v = inout($class) value, options(nostack, preserves_flags));
                }
                value
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $t
            }
        }
    };
}

word!(u8, 1, reg_byte, "{v}", "byte", "movzx {v:e}, byte ptr [{p}]");
word!(u16, 2, reg, "{v:x}", "word", "movzx {v:e}, word ptr [{p}]");
word!(u32, 4, reg, "{v:e}", "dword", "mov {v:e}, dword ptr [{p}]");
word!(u64, 8, reg, "{v:r}", "qword", "mov {v}, qword ptr [{p}]");

/// LOCK CMPXCHG16B on a 16-byte aligned address: returns what memory held and whether `new` was stored.
pub(crate) fn compare_exchange_16(at: HostAddress, expected: u128, new: u128) -> (u128, bool) {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    let equal: u8;
    // SAFETY: `HostAddress` promises writable memory; the caller checked alignment. RBX is restored because
    // the compiler reserves it.
    unsafe {
        asm!("xchg {b}, rbx", "lock cmpxchg16b [{p}]", "sete {e}", "mov rbx, {b}",
            p = in(reg) at.0, b = inout(reg) new as u64 => _, e = out(reg_byte) equal,
            in("rcx") (new >> 64) as u64, inout("rax") low, inout("rdx") high, options(nostack));
    }
    (u128::from(low) | u128::from(high) << 64, equal != 0)
}

/// Copies guest memory out, in whole words where source and length allow.
pub(crate) fn copy_out(at: HostAddress, out: &mut [u8]) {
    match out.len() {
        1 => out[0] = u8::load(at),
        2 => out.copy_from_slice(&u16::load(at).to_le_bytes()),
        4 => out.copy_from_slice(&u32::load(at).to_le_bytes()),
        8 => out.copy_from_slice(&u64::load(at).to_le_bytes()),
        16 | 32 => {
            for (i, part) in out.chunks_exact_mut(16).enumerate() {
                part.copy_from_slice(&load_vector(HostAddress(at.0 + 16 * i as u64)));
            }
        }
        len => {
            // SAFETY: the promise of `HostAddress` covers `len` bytes; `rep movsb` makes no assumption about
            // concurrent writers.
            unsafe {
                asm!("rep movsb", inout("rsi") at.0 => _, inout("rdi") out.as_mut_ptr() => _,
                    inout("rcx") len => _, options(nostack, preserves_flags));
            }
        }
    }
}

/// One load of 16 bytes: REP MOVSB takes longer to start.
#[inline(always)]
fn load_vector(at: HostAddress) -> [u8; 16] {
    let value: u128;
    // SAFETY: `HostAddress` promises readable memory; the asm reads it once, at any alignment.
    unsafe {
        let register: std::arch::x86_64::__m128i;
        asm!("movups {v}, [{p}]", p = in(reg) at.0, v = out(xmm_reg) register,
            options(nostack, preserves_flags, readonly));
        value = std::mem::transmute::<std::arch::x86_64::__m128i, u128>(register);
    }
    value.to_le_bytes()
}

/// One store of 16 bytes.
#[inline(always)]
fn store_vector(at: HostAddress, value: [u8; 16]) {
    // SAFETY: `HostAddress` promises writable memory that no Rust reference covers; any alignment will do.
    unsafe {
        let register = std::mem::transmute::<u128, std::arch::x86_64::__m128i>(u128::from_le_bytes(value));
        asm!("movups [{p}], {v}", p = in(reg) at.0, v = in(xmm_reg) register,
            options(nostack, preserves_flags));
    }
}

/// Copies to guest memory, in one store where the length is a word's.
pub(crate) fn copy_in(at: HostAddress, data: &[u8]) {
    match *data {
        [a] => u8::store(at, a),
        [a, b] => u16::store(at, u16::from_le_bytes([a, b])),
        [a, b, c, d] => u32::store(at, u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::store(at, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ if matches!(data.len(), 16 | 32) => {
            for (i, part) in data.chunks_exact(16).enumerate() {
                let mut value = [0; 16];
                value.copy_from_slice(part);
                store_vector(HostAddress(at.0 + 16 * i as u64), value);
            }
        }
        _ => {
            // SAFETY: as in `copy_out`, for writing.
            unsafe {
                asm!("rep movsb", inout("rsi") data.as_ptr() => _, inout("rdi") at.0 => _,
                    inout("rcx") data.len() => _, options(nostack, preserves_flags));
            }
        }
    }
}

/// Moves `count` elements of `T` upwards or downwards exactly as REP MOVS does, overlap included.
pub(crate) fn rep_movs<T: Word>(from: HostAddress, to: HostAddress, count: u64, down: bool) {
    // SAFETY: the caller has checked that all elements of both runs lie inside one page of guest RAM each;
    // DF is clear again when the asm ends.
    unsafe {
        macro_rules! run {
            ($op:literal) => {
                if down {
                    asm!("std", concat!("rep ", $op), "cld", inout("rsi") from.0 => _, inout("rdi") to.0 => _,
                        inout("rcx") count => _, options(nostack));
                } else {
                    asm!(concat!("rep ", $op), inout("rsi") from.0 => _, inout("rdi") to.0 => _,
                        inout("rcx") count => _, options(nostack, preserves_flags));
                }
            };
        }
        match T::BYTES {
            1 => run!("movsb"),
            2 => run!("movsw"),
            4 => run!("movsd"),
            _ => run!("movsq"),
        }
    }
}

/// Fills `count` elements from `to` upwards (`to` is the lowest address).
pub(crate) fn rep_stos<T: Word>(to: HostAddress, value: T, count: u64) {
    let value = value.to_u64();
    // SAFETY: as in `rep_movs`.
    unsafe {
        macro_rules! run {
            ($op:literal) => {
                asm!(concat!("rep ", $op), in("rax") value, inout("rdi") to.0 => _,
                    inout("rcx") count => _, options(nostack, preserves_flags))
            };
        }
        match T::BYTES {
            1 => run!("stosb"),
            2 => run!("stosw"),
            4 => run!("stosd"),
            _ => run!("stosq"),
        }
    }
}
