//! Integer arithmetic with exact flags: the host's own instruction runs on the guest's operands.
//!
//! Same instruction set, so results and flags are right by construction, the undefined ones included: they are
//! whatever this processor makes of them. Flags travel through AX: `lahf` and `seto al` take them out, `add al,
//! 0x7f` (OF from bit 0) and `sahf` put them in. Instructions that replace every flag do without the second
//! half; the others get the guest's flags first, so that a flag the host leaves alone stays the guest's.
//!
//! What the host cannot run in 64-bit mode (BCD adjustments) is in `execute/legacy.rs`.
#![allow(unsafe_code)]
// UNSAFETY: inline assembly on register operands only.

use std::arch::asm;

use crate::cpu::flag;
use crate::execute::operand::Operand;

/// AX after `lahf; seto al` as RFLAGS bits.
#[inline(always)]
fn from_ax(ax: u64) -> u64 {
    (ax >> 8 & 0xd5) | (ax & 1) << 11
}

/// RFLAGS as AX for `add al, 0x7f; sahf`.
#[inline(always)]
fn to_ax(flags: u64) -> u64 {
    (flags & 0xd5) << 8 | (flags >> 11 & 1)
}

#[inline(always)]
fn replace(flags: &mut u64, ax: u64) {
    *flags = *flags & !flag::ARITHMETIC | from_ax(ax);
}

/// Arithmetic of one operand size. `flags` is RFLAGS; only what the instruction changes is changed.
pub(crate) trait Arith: Operand {
    fn add(flags: &mut u64, a: Self, b: Self) -> Self;
    fn adc(flags: &mut u64, a: Self, b: Self) -> Self;
    fn sub(flags: &mut u64, a: Self, b: Self) -> Self;
    fn sbb(flags: &mut u64, a: Self, b: Self) -> Self;
    fn and(flags: &mut u64, a: Self, b: Self) -> Self;
    fn or(flags: &mut u64, a: Self, b: Self) -> Self;
    fn xor(flags: &mut u64, a: Self, b: Self) -> Self;
    fn inc(flags: &mut u64, a: Self) -> Self;
    fn dec(flags: &mut u64, a: Self) -> Self;
    fn neg(flags: &mut u64, a: Self) -> Self;
    /// Shifts and rotates mask the count themselves; a masked count of 0 changes no flag.
    fn shl(flags: &mut u64, a: Self, count: u8) -> Self;
    fn shr(flags: &mut u64, a: Self, count: u8) -> Self;
    fn sar(flags: &mut u64, a: Self, count: u8) -> Self;
    fn rol(flags: &mut u64, a: Self, count: u8) -> Self;
    fn ror(flags: &mut u64, a: Self, count: u8) -> Self;
    fn rcl(flags: &mut u64, a: Self, count: u8) -> Self;
    fn rcr(flags: &mut u64, a: Self, count: u8) -> Self;
    /// Low and high half of the product.
    fn mul(flags: &mut u64, a: Self, b: Self) -> (Self, Self);
    /// Low and high half of the signed product.
    fn imul(flags: &mut u64, a: Self, b: Self) -> (Self, Self);
    /// Quotient and remainder of `high:low` by `divisor`, `None` for #DE.
    fn div(flags: &mut u64, low: Self, high: Self, divisor: Self) -> Option<(Self, Self)>;
    /// Like [`Arith::div`], signed.
    fn idiv(flags: &mut u64, low: Self, high: Self, divisor: Self) -> Option<(Self, Self)>;
}

/// What exists for 16, 32 and 64 bits only. Results that may leave the destination unchanged take and give
/// the whole 64-bit register.
pub(crate) trait WideArith: Arith {
    /// IMUL with a truncated product.
    fn imul2(flags: &mut u64, a: Self, b: Self) -> Self;
    fn shld(flags: &mut u64, a: Self, b: Self, count: u8) -> Self;
    fn shrd(flags: &mut u64, a: Self, b: Self, count: u8) -> Self;
    /// The bit index is taken modulo the operand size.
    fn bt(flags: &mut u64, a: Self, bit: Self) -> Self;
    fn bts(flags: &mut u64, a: Self, bit: Self) -> Self;
    fn btr(flags: &mut u64, a: Self, bit: Self) -> Self;
    fn btc(flags: &mut u64, a: Self, bit: Self) -> Self;
    fn bsf(flags: &mut u64, register: u64, source: Self) -> u64;
    fn bsr(flags: &mut u64, register: u64, source: Self) -> u64;
    fn lzcnt(flags: &mut u64, register: u64, source: Self) -> u64;
    fn tzcnt(flags: &mut u64, register: u64, source: Self) -> u64;
    fn popcnt(flags: &mut u64, register: u64, source: Self) -> u64;
}

/// BMI1 and BMI2, for 32 and 64 bits.
pub(crate) trait BmiArith: WideArith {
    fn andn(flags: &mut u64, a: Self, b: Self) -> Self;
    fn bextr(flags: &mut u64, a: Self, control: Self) -> Self;
    fn bzhi(flags: &mut u64, a: Self, index: Self) -> Self;
    fn blsi(flags: &mut u64, a: Self) -> Self;
    fn blsr(flags: &mut u64, a: Self) -> Self;
    fn blsmsk(flags: &mut u64, a: Self) -> Self;
    fn pdep(a: Self, mask: Self) -> Self;
    fn pext(a: Self, mask: Self) -> Self;
}

macro_rules! arith {
    ($t:ty, $class:ident, $m:literal) => {
        impl Arith for $t {
            arith!(@two add "add", $class, $m);
            arith!(@two sub "sub", $class, $m);
            arith!(@two and "and", $class, $m);
            arith!(@two or "or", $class, $m);
            arith!(@two xor "xor", $class, $m);
            arith!(@carry adc "adc", $class, $m);
            arith!(@carry sbb "sbb", $class, $m);
            arith!(@keep_cf inc "inc", $class, $m);
            arith!(@keep_cf dec "dec", $class, $m);
            arith!(@shift shl "shl", $class, $m);
            arith!(@shift shr "shr", $class, $m);
            arith!(@shift sar "sar", $class, $m);
            arith!(@shift rol "rol", $class, $m);
            arith!(@shift ror "ror", $class, $m);
            arith!(@shift rcl "rcl", $class, $m);
            arith!(@shift rcr "rcr", $class, $m);
            #[inline(always)]
            fn neg(flags: &mut u64, a: Self) -> Self {
                let mut r = a;
                let ax: u64;
                // SAFETY: register operands only.
                unsafe {
                    asm!(concat!("neg {a", $m, "}"), "lahf", "seto al", a = inout($class) r, out("rax") ax,
                        options(pure, nomem, nostack));
                }
                replace(flags, ax);
                r
            }
            fn mul(flags: &mut u64, a: Self, b: Self) -> (Self, Self) {
                Self::product(flags, a, b, false)
            }
            fn imul(flags: &mut u64, a: Self, b: Self) -> (Self, Self) {
                Self::product(flags, a, b, true)
            }
            fn div(flags: &mut u64, low: Self, high: Self, divisor: Self) -> Option<(Self, Self)> {
                // Also catches a divisor of zero.
                if high >= divisor { None } else { Some(Self::quotient(flags, low, high, divisor, false)) }
            }
            fn idiv(flags: &mut u64, low: Self, high: Self, divisor: Self) -> Option<(Self, Self)> {
                let sign = 1 << (Self::BITS - 1);
                let negative = high & sign != 0;
                let divisor_negative = divisor & sign != 0;
                let magnitude = if divisor_negative { divisor.wrapping_neg() } else { divisor };
                let (l, h) = if negative {
                    (low.wrapping_neg(), (!high).wrapping_add(Self::from(low == 0)))
                } else {
                    (low, high)
                };
                if h >= magnitude {
                    return None;
                }
                let mut scratch = 0;
                let (q, _) = Self::quotient(&mut scratch, l, h, magnitude, false);
                let limit = if negative != divisor_negative { sign } else { sign - 1 };
                if q > limit { None } else { Some(Self::quotient(flags, low, high, divisor, true)) }
            }
        }
    };
    (@two $name:ident $op:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, a: Self, b: Self) -> Self {
            let mut r = a;
            let ax: u64;
            // SAFETY: register operands only.
            unsafe {
                asm!(concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) r, b = in($class) b, out("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@carry $name:ident $op:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, a: Self, b: Self) -> Self {
            let mut r = a;
            let mut ax = *flags;
            // SAFETY: register operands only.
            unsafe {
                asm!("bt eax, 0", concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout($class) r, b = in($class) b, inout("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@keep_cf $name:ident $op:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, a: Self) -> Self {
            let mut r = a;
            let ax: u64;
            // SAFETY: register operands only.
            unsafe {
                asm!(concat!($op, " {a", $m, "}"), "lahf", "seto al", a = inout($class) r, out("rax") ax,
                    options(pure, nomem, nostack));
            }
            let kept = !flag::ARITHMETIC | flag::CF;
            *flags = *flags & kept | from_ax(ax) & !kept;
            r
        }
    };
    (@shift $name:ident $op:literal, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, a: Self, count: u8) -> Self {
            let mut r = a;
            let mut ax = to_ax(*flags);
            // SAFETY: register operands only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {a", $m, "}, cl"), "lahf", "seto al",
                    a = inout($class) r, in("cl") count, inout("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
}

arith!(u8, reg_byte, "");
arith!(u16, reg, ":x");
arith!(u32, reg, ":e");
arith!(u64, reg, ":r");

/// The one-operand forms, whose operands are RAX and RDX.
trait Double: Sized {
    fn product(flags: &mut u64, a: Self, b: Self, signed: bool) -> (Self, Self);
    /// The quotient must fit.
    fn quotient(flags: &mut u64, low: Self, high: Self, divisor: Self, signed: bool) -> (Self, Self);
}

macro_rules! double {
    ($t:ty, $m:literal) => {
        impl Double for $t {
            #[inline]
            fn product(flags: &mut u64, a: Self, b: Self, signed: bool) -> (Self, Self) {
                let mut ax = to_ax(*flags);
                let mut low = u64::from(a);
                let high: u64;
                macro_rules! run {
                    ($op:literal) => {
                        // SAFETY: register operands only.
                        unsafe {
                            asm!("add al, 0x7f", "sahf", "mov rax, {low}", concat!($op, " {b", $m, "}"),
                                "mov {low}, rax", "lahf", "seto al",
                                low = inout(reg) low, b = in(reg) b, out("rdx") high, inout("rax") ax,
                                options(pure, nomem, nostack))
                        }
                    };
                }
                if signed {
                    run!("imul");
                } else {
                    run!("mul");
                }
                replace(flags, ax);
                (low as $t, high as $t)
            }
            #[inline]
            fn quotient(flags: &mut u64, low: Self, high: Self, divisor: Self, signed: bool) -> (Self, Self) {
                let mut ax = to_ax(*flags);
                let mut value = u64::from(low);
                let mut rest = u64::from(high);
                macro_rules! run {
                    ($op:literal) => {
                        // SAFETY: register operands only; the caller checked that the quotient fits.
                        unsafe {
                            asm!("add al, 0x7f", "sahf", "mov rax, {v}", concat!($op, " {d", $m, "}"),
                                "mov {v}, rax", "lahf", "seto al",
                                v = inout(reg) value, d = in(reg) divisor, inout("rdx") rest,
                                inout("rax") ax, options(pure, nomem, nostack))
                        }
                    };
                }
                if signed {
                    run!("idiv");
                } else {
                    run!("div");
                }
                replace(flags, ax);
                (value as $t, rest as $t)
            }
        }
    };
}

double!(u16, ":x");
double!(u32, ":e");
double!(u64, ":r");

/// The byte forms use AX alone.
impl Double for u8 {
    fn product(flags: &mut u64, a: Self, b: Self, signed: bool) -> (Self, Self) {
        let mut ax = to_ax(*flags);
        let mut value = u64::from(a);
        macro_rules! run {
            ($op:literal) => {
                // SAFETY: register operands only.
                unsafe {
                    asm!("add al, 0x7f", "sahf", "mov rax, {v}", concat!($op, " {b}"), "mov {v}, rax",
                        "lahf", "seto al", v = inout(reg) value, b = in(reg_byte) b, inout("rax") ax,
                        options(pure, nomem, nostack))
                }
            };
        }
        if signed {
            run!("imul");
        } else {
            run!("mul");
        }
        replace(flags, ax);
        (value as u8, (value >> 8) as u8)
    }
    fn quotient(flags: &mut u64, low: Self, high: Self, divisor: Self, signed: bool) -> (Self, Self) {
        let mut ax = to_ax(*flags);
        let mut value = u64::from(low) | u64::from(high) << 8;
        macro_rules! run {
            ($op:literal) => {
                // SAFETY: register operands only; the caller checked that the quotient fits.
                unsafe {
                    asm!("add al, 0x7f", "sahf", "mov rax, {v}", concat!($op, " {d}"), "mov {v}, rax",
                        "lahf", "seto al", v = inout(reg) value, d = in(reg_byte) divisor, inout("rax") ax,
                        options(pure, nomem, nostack))
                }
            };
        }
        if signed {
            run!("idiv");
        } else {
            run!("div");
        }
        replace(flags, ax);
        (value as u8, (value >> 8) as u8)
    }
}

macro_rules! wide {
    ($t:ty, $m:literal) => {
        impl WideArith for $t {
            wide!(@two imul2 "imul", $m);
            wide!(@two bts "bts", $m);
            wide!(@two btr "btr", $m);
            wide!(@two btc "btc", $m);
            wide!(@two bt "bt", $m);
            wide!(@double shld "shld", $m);
            wide!(@double shrd "shrd", $m);
            wide!(@scan bsf "bsf", $m);
            wide!(@scan bsr "bsr", $m);
            wide!(@scan lzcnt "lzcnt", $m);
            wide!(@scan tzcnt "tzcnt", $m);
            wide!(@scan popcnt "popcnt", $m);
        }
    };
    (@two $name:ident $op:literal, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, a: Self, b: Self) -> Self {
            let mut r = a;
            let mut ax = to_ax(*flags);
            // SAFETY: register operands only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout(reg) r, b = in(reg) b, inout("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@double $name:ident $op:literal, $m:literal) => {
        fn $name(flags: &mut u64, a: Self, b: Self, count: u8) -> Self {
            let mut r = a;
            let mut ax = to_ax(*flags);
            // SAFETY: register operands only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {a", $m, "}, {b", $m, "}, cl"), "lahf", "seto al",
                    a = inout(reg) r, b = in(reg) b, in("cl") count, inout("rax") ax,
                    options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@scan $name:ident $op:literal, $m:literal) => {
        #[inline(always)]
        fn $name(flags: &mut u64, register: u64, source: Self) -> u64 {
            let mut r = register;
            let mut ax = to_ax(*flags);
            // SAFETY: register operands only.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {a", $m, "}, {b", $m, "}"), "lahf", "seto al",
                    a = inout(reg) r, b = in(reg) source, inout("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
}

wide!(u16, ":x");
wide!(u32, ":e");
wide!(u64, ":r");

macro_rules! bmi {
    ($t:ty, $m:literal) => {
        impl BmiArith for $t {
            bmi!(@three andn "andn", $m);
            bmi!(@three bextr "bextr", $m);
            bmi!(@three bzhi "bzhi", $m);
            bmi!(@one blsi "blsi", $m);
            bmi!(@one blsr "blsr", $m);
            bmi!(@one blsmsk "blsmsk", $m);
            bmi!(@plain pdep "pdep", $m);
            bmi!(@plain pext "pext", $m);
        }
    };
    (@three $name:ident $op:literal, $m:literal) => {
        fn $name(flags: &mut u64, a: Self, b: Self) -> Self {
            let r: Self;
            let mut ax = to_ax(*flags);
            // SAFETY: register operands only; the CPU model offers the instruction only if the host has it.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {r", $m, "}, {a", $m, "}, {b", $m, "}"), "lahf",
                    "seto al", r = out(reg) r, a = in(reg) a, b = in(reg) b, inout("rax") ax,
                    options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@one $name:ident $op:literal, $m:literal) => {
        fn $name(flags: &mut u64, a: Self) -> Self {
            let r: Self;
            let mut ax = to_ax(*flags);
            // SAFETY: as above.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($op, " {r", $m, "}, {a", $m, "}"), "lahf", "seto al",
                    r = out(reg) r, a = in(reg) a, inout("rax") ax, options(pure, nomem, nostack));
            }
            replace(flags, ax);
            r
        }
    };
    (@plain $name:ident $op:literal, $m:literal) => {
        fn $name(a: Self, mask: Self) -> Self {
            let r: Self;
            // SAFETY: as above.
            unsafe {
                asm!(concat!($op, " {r", $m, "}, {a", $m, "}, {b", $m, "}"), r = out(reg) r, a = in(reg) a,
                    b = in(reg) mask, options(pure, nomem, nostack, preserves_flags));
            }
            r
        }
    };
}

bmi!(u32, ":e");
bmi!(u64, ":r");

/// CRC32 (the Castagnoli polynomial) of one operand.
pub(crate) fn crc32<T: Operand>(crc: u32, value: T) -> u32 {
    let mut r = u64::from(crc);
    let v = value.to_u64();
    // SAFETY: register operands only; the CPU model offers CRC32 only if the host has it.
    unsafe {
        match T::BITS {
            8 => asm!("crc32 {r:e}, {v}", r = inout(reg) r, v = in(reg_byte) v as u8,
                options(pure, nomem, nostack, preserves_flags)),
            16 => asm!("crc32 {r:e}, {v:x}", r = inout(reg) r, v = in(reg) v,
                options(pure, nomem, nostack, preserves_flags)),
            32 => asm!("crc32 {r:e}, {v:e}", r = inout(reg) r, v = in(reg) v,
                options(pure, nomem, nostack, preserves_flags)),
            _ => asm!("crc32 {r}, {v}", r = inout(reg) r, v = in(reg) v,
                options(pure, nomem, nostack, preserves_flags)),
        }
    }
    r as u32
}
