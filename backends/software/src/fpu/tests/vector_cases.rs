//! SSE, MMX, AVX, AVX2, FMA, F16C, AES, PCLMUL and SHA against the host.

use std::arch::asm;

use super::Fixture;
use super::fixture::{DATA, Random};
use crate::cpu::flag;
use crate::exception::Exception;

/// Registers 0 to 3 of each kind, memory and control around one instruction.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq)]
struct Native {
    /// FXSAVE image: only the MMX registers matter.
    fx: [u8; 512],
    memory: [u8; 64],
    ymm: [[u8; 32]; 4],
    gpr: [u64; 3],
    mxcsr: u32,
    host_mxcsr: u32,
    flags: u64,
    code: [usize; 2],
}

struct Case {
    text: &'static str,
    native: fn(&mut Native),
}

macro_rules! cases {
    ($($text:literal,)*) => {
        vec![$(Case { text: $text, native: |state| {
            // SAFETY: the instruction reads and writes only the registers named below and 64 bytes at RDI,
            // which is `state.memory`; MXCSR, the x87 state and the flags are restored.
            unsafe {
                asm!(
                    "lea rax, [rip + 2f]",
                    "mov [rsi + 744], rax",
                    "lea rax, [rip + 3f]",
                    "mov [rsi + 752], rax",
                    "lea rdi, [rsi + 512]",
                    "fxrstor64 [rsi]",
                    "vmovups ymm0, [rsi + 576]",
                    "vmovups ymm1, [rsi + 608]",
                    "vmovups ymm2, [rsi + 640]",
                    "vmovups ymm3, [rsi + 672]",
                    "push qword ptr [rsi + 736]",
                    "popfq",
                    "mov rax, [rsi + 704]",
                    "mov rcx, [rsi + 712]",
                    "mov rdx, [rsi + 720]",
                    "ldmxcsr [rsi + 728]",
                    "2:",
                    $text,
                    "3:",
                    "stmxcsr [rsi + 728]",
                    "ldmxcsr [rsi + 732]",
                    "mov [rsi + 704], rax",
                    "mov [rsi + 712], rcx",
                    "mov [rsi + 720], rdx",
                    "pushfq",
                    "pop qword ptr [rsi + 736]",
                    "vmovups [rsi + 576], ymm0",
                    "vmovups [rsi + 608], ymm1",
                    "vmovups [rsi + 640], ymm2",
                    "vmovups [rsi + 672], ymm3",
                    "fxsave64 [rsi]",
                    "fninit",
                    "vzeroupper",
                    in("rsi") state,
                    clobber_abi("sysv64"),
                );
            }
        }}),*]
    };
}

#[rustfmt::skip]
fn legacy_cases() -> Vec<Case> {
    cases![
        "addps xmm1, xmm2",
        "addps xmm3, xmmword ptr [rdi]",
        "addpd xmm1, xmm2",
        "addpd xmm3, xmmword ptr [rdi]",
        "addss xmm1, xmm2",
        "addss xmm3, dword ptr [rdi]",
        "addsd xmm1, xmm2",
        "addsd xmm3, qword ptr [rdi]",
        "subps xmm1, xmm2",
        "subps xmm3, xmmword ptr [rdi]",
        "subpd xmm1, xmm2",
        "subpd xmm3, xmmword ptr [rdi]",
        "subss xmm1, xmm2",
        "subss xmm3, dword ptr [rdi]",
        "subsd xmm1, xmm2",
        "subsd xmm3, qword ptr [rdi]",
        "mulps xmm1, xmm2",
        "mulps xmm3, xmmword ptr [rdi]",
        "mulpd xmm1, xmm2",
        "mulpd xmm3, xmmword ptr [rdi]",
        "mulss xmm1, xmm2",
        "mulss xmm3, dword ptr [rdi]",
        "mulsd xmm1, xmm2",
        "mulsd xmm3, qword ptr [rdi]",
        "divps xmm1, xmm2",
        "divps xmm3, xmmword ptr [rdi]",
        "divpd xmm1, xmm2",
        "divpd xmm3, xmmword ptr [rdi]",
        "divss xmm1, xmm2",
        "divss xmm3, dword ptr [rdi]",
        "divsd xmm1, xmm2",
        "divsd xmm3, qword ptr [rdi]",
        "minps xmm1, xmm2",
        "minps xmm3, xmmword ptr [rdi]",
        "maxpd xmm1, xmm2",
        "maxpd xmm3, xmmword ptr [rdi]",
        "minss xmm1, xmm2",
        "minss xmm3, dword ptr [rdi]",
        "maxsd xmm1, xmm2",
        "maxsd xmm3, qword ptr [rdi]",
        "sqrtps xmm1, xmm2",
        "sqrtps xmm3, xmmword ptr [rdi]",
        "sqrtpd xmm1, xmm2",
        "sqrtpd xmm3, xmmword ptr [rdi]",
        "sqrtss xmm1, xmm2",
        "sqrtss xmm3, dword ptr [rdi]",
        "sqrtsd xmm1, xmm2",
        "sqrtsd xmm3, qword ptr [rdi]",
        "rcpps xmm1, xmm2",
        "rcpps xmm3, xmmword ptr [rdi]",
        "rcpss xmm1, xmm2",
        "rcpss xmm3, dword ptr [rdi]",
        "rsqrtps xmm1, xmm2",
        "rsqrtps xmm3, xmmword ptr [rdi]",
        "rsqrtss xmm1, xmm2",
        "rsqrtss xmm3, dword ptr [rdi]",
        "andnps xmm1, xmm2",
        "andnps xmm3, xmmword ptr [rdi]",
        "andps xmm1, xmm2",
        "andps xmm3, xmmword ptr [rdi]",
        "orpd xmm1, xmm2",
        "orpd xmm3, xmmword ptr [rdi]",
        "xorpd xmm1, xmm2",
        "xorpd xmm3, xmmword ptr [rdi]",
        "unpcklps xmm1, xmm2",
        "unpcklps xmm3, xmmword ptr [rdi]",
        "unpckhpd xmm1, xmm2",
        "unpckhpd xmm3, xmmword ptr [rdi]",
        "addsubps xmm1, xmm2",
        "addsubps xmm3, xmmword ptr [rdi]",
        "addsubpd xmm1, xmm2",
        "addsubpd xmm3, xmmword ptr [rdi]",
        "haddps xmm1, xmm2",
        "haddps xmm3, xmmword ptr [rdi]",
        "hsubpd xmm1, xmm2",
        "hsubpd xmm3, xmmword ptr [rdi]",
        "cvtps2pd xmm1, xmm2",
        "cvtps2pd xmm3, qword ptr [rdi]",
        "cvtpd2ps xmm1, xmm2",
        "cvtpd2ps xmm3, xmmword ptr [rdi]",
        "cvtss2sd xmm1, xmm2",
        "cvtss2sd xmm3, dword ptr [rdi]",
        "cvtsd2ss xmm1, xmm2",
        "cvtsd2ss xmm3, qword ptr [rdi]",
        "cvtdq2ps xmm1, xmm2",
        "cvtdq2ps xmm3, xmmword ptr [rdi]",
        "cvtps2dq xmm1, xmm2",
        "cvtps2dq xmm3, xmmword ptr [rdi]",
        "cvttps2dq xmm1, xmm2",
        "cvttps2dq xmm3, xmmword ptr [rdi]",
        "cvtdq2pd xmm1, xmm2",
        "cvtdq2pd xmm3, qword ptr [rdi]",
        "cvtpd2dq xmm1, xmm2",
        "cvtpd2dq xmm3, xmmword ptr [rdi]",
        "cvttpd2dq xmm1, xmm2",
        "cvttpd2dq xmm3, xmmword ptr [rdi]",
        "paddb xmm1, xmm2",
        "paddb xmm3, xmmword ptr [rdi]",
        "paddsw xmm1, xmm2",
        "paddsw xmm3, xmmword ptr [rdi]",
        "paddusb xmm1, xmm2",
        "paddusb xmm3, xmmword ptr [rdi]",
        "psubd xmm1, xmm2",
        "psubd xmm3, xmmword ptr [rdi]",
        "psubq xmm1, xmm2",
        "psubq xmm3, xmmword ptr [rdi]",
        "pmullw xmm1, xmm2",
        "pmullw xmm3, xmmword ptr [rdi]",
        "pmulhw xmm1, xmm2",
        "pmulhw xmm3, xmmword ptr [rdi]",
        "pmulhuw xmm1, xmm2",
        "pmulhuw xmm3, xmmword ptr [rdi]",
        "pmuludq xmm1, xmm2",
        "pmuludq xmm3, xmmword ptr [rdi]",
        "pmaddwd xmm1, xmm2",
        "pmaddwd xmm3, xmmword ptr [rdi]",
        "psadbw xmm1, xmm2",
        "psadbw xmm3, xmmword ptr [rdi]",
        "pavgb xmm1, xmm2",
        "pavgb xmm3, xmmword ptr [rdi]",
        "pavgw xmm1, xmm2",
        "pavgw xmm3, xmmword ptr [rdi]",
        "pminub xmm1, xmm2",
        "pminub xmm3, xmmword ptr [rdi]",
        "pmaxsw xmm1, xmm2",
        "pmaxsw xmm3, xmmword ptr [rdi]",
        "packssdw xmm1, xmm2",
        "packssdw xmm3, xmmword ptr [rdi]",
        "packuswb xmm1, xmm2",
        "packuswb xmm3, xmmword ptr [rdi]",
        "punpcklbw xmm1, xmm2",
        "punpcklbw xmm3, xmmword ptr [rdi]",
        "punpckhqdq xmm1, xmm2",
        "punpckhqdq xmm3, xmmword ptr [rdi]",
        "pcmpeqb xmm1, xmm2",
        "pcmpeqb xmm3, xmmword ptr [rdi]",
        "pcmpgtd xmm1, xmm2",
        "pcmpgtd xmm3, xmmword ptr [rdi]",
        "pand xmm1, xmm2",
        "pand xmm3, xmmword ptr [rdi]",
        "pandn xmm1, xmm2",
        "pandn xmm3, xmmword ptr [rdi]",
        "por xmm1, xmm2",
        "por xmm3, xmmword ptr [rdi]",
        "pxor xmm1, xmm2",
        "pxor xmm3, xmmword ptr [rdi]",
        "psllw xmm1, xmm2",
        "psllw xmm3, xmmword ptr [rdi]",
        "psrld xmm1, xmm2",
        "psrld xmm3, xmmword ptr [rdi]",
        "psraw xmm1, xmm2",
        "psraw xmm3, xmmword ptr [rdi]",
        "psllq xmm1, xmm2",
        "psllq xmm3, xmmword ptr [rdi]",
        "psrlq xmm1, xmm2",
        "psrlq xmm3, xmmword ptr [rdi]",
        "pshufb xmm1, xmm2",
        "pshufb xmm3, xmmword ptr [rdi]",
        "phaddw xmm1, xmm2",
        "phaddw xmm3, xmmword ptr [rdi]",
        "phsubd xmm1, xmm2",
        "phsubd xmm3, xmmword ptr [rdi]",
        "phaddsw xmm1, xmm2",
        "phaddsw xmm3, xmmword ptr [rdi]",
        "pmaddubsw xmm1, xmm2",
        "pmaddubsw xmm3, xmmword ptr [rdi]",
        "pmulhrsw xmm1, xmm2",
        "pmulhrsw xmm3, xmmword ptr [rdi]",
        "psignb xmm1, xmm2",
        "psignb xmm3, xmmword ptr [rdi]",
        "pabsd xmm1, xmm2",
        "pabsd xmm3, xmmword ptr [rdi]",
        "pmuldq xmm1, xmm2",
        "pmuldq xmm3, xmmword ptr [rdi]",
        "pcmpeqq xmm1, xmm2",
        "pcmpeqq xmm3, xmmword ptr [rdi]",
        "pcmpgtq xmm1, xmm2",
        "pcmpgtq xmm3, xmmword ptr [rdi]",
        "packusdw xmm1, xmm2",
        "packusdw xmm3, xmmword ptr [rdi]",
        "pminsb xmm1, xmm2",
        "pminsb xmm3, xmmword ptr [rdi]",
        "pmaxud xmm1, xmm2",
        "pmaxud xmm3, xmmword ptr [rdi]",
        "pmulld xmm1, xmm2",
        "pmulld xmm3, xmmword ptr [rdi]",
        "phminposuw xmm1, xmm2",
        "phminposuw xmm3, xmmword ptr [rdi]",
        "pmovsxbw xmm1, xmm2",
        "pmovsxbw xmm3, qword ptr [rdi]",
        "pmovzxwd xmm1, xmm2",
        "pmovzxwd xmm3, qword ptr [rdi]",
        "pmovsxdq xmm1, xmm2",
        "pmovsxdq xmm3, qword ptr [rdi]",
        "movshdup xmm1, xmm2",
        "movshdup xmm3, xmmword ptr [rdi]",
        "movsldup xmm1, xmm2",
        "movsldup xmm3, xmmword ptr [rdi]",
        "movddup xmm1, xmm2",
        "movddup xmm3, qword ptr [rdi]",
        "aesenc xmm1, xmm2",
        "aesenc xmm3, xmmword ptr [rdi]",
        "aesdeclast xmm1, xmm2",
        "aesdeclast xmm3, xmmword ptr [rdi]",
        "aesimc xmm1, xmm2",
        "aesimc xmm3, xmmword ptr [rdi]",
        "sha1nexte xmm1, xmm2",
        "sha1nexte xmm3, xmmword ptr [rdi]",
        "sha1msg1 xmm1, xmm2",
        "sha1msg1 xmm3, xmmword ptr [rdi]",
        "sha1msg2 xmm1, xmm2",
        "sha1msg2 xmm3, xmmword ptr [rdi]",
        "sha256msg1 xmm1, xmm2",
        "sha256msg1 xmm3, xmmword ptr [rdi]",
        "sha256msg2 xmm1, xmm2",
        "sha256msg2 xmm3, xmmword ptr [rdi]",
        "ptest xmm1, xmm2",
        "ptest xmm3, xmmword ptr [rdi]",
        "ucomiss xmm1, xmm2",
        "ucomiss xmm3, dword ptr [rdi]",
        "comisd xmm1, xmm2",
        "comisd xmm3, qword ptr [rdi]",
        "comiss xmm1, xmm2",
        "comiss xmm3, dword ptr [rdi]",
        "ucomisd xmm1, xmm2",
        "ucomisd xmm3, qword ptr [rdi]",
        "blendvps xmm1, xmm2, xmm0",
        "blendvps xmm3, xmmword ptr [rdi], xmm0",
        "pblendvb xmm1, xmm2, xmm0",
        "pblendvb xmm3, xmmword ptr [rdi], xmm0",
        "sha256rnds2 xmm1, xmm2, xmm0",
        "sha256rnds2 xmm3, xmmword ptr [rdi], xmm0",
        "shufps xmm1, xmm2, 0x1b",
        "shufps xmm2, xmmword ptr [rdi], 0x1b",
        "shufpd xmm1, xmm2, 1",
        "shufpd xmm2, xmmword ptr [rdi], 1",
        "pshufd xmm1, xmm2, 0x4e",
        "pshufd xmm2, xmmword ptr [rdi], 0x4e",
        "pshuflw xmm1, xmm2, 0x93",
        "pshuflw xmm2, xmmword ptr [rdi], 0x93",
        "pshufhw xmm1, xmm2, 0x1b",
        "pshufhw xmm2, xmmword ptr [rdi], 0x1b",
        "cmpps xmm1, xmm2, 1",
        "cmpps xmm2, xmmword ptr [rdi], 1",
        "cmppd xmm1, xmm2, 5",
        "cmppd xmm2, xmmword ptr [rdi], 5",
        "cmpss xmm1, xmm2, 2",
        "cmpss xmm2, dword ptr [rdi], 2",
        "cmpsd xmm1, xmm2, 6",
        "cmpsd xmm2, qword ptr [rdi], 6",
        "roundps xmm1, xmm2, 3",
        "roundps xmm2, xmmword ptr [rdi], 3",
        "roundpd xmm1, xmm2, 1",
        "roundpd xmm2, xmmword ptr [rdi], 1",
        "roundss xmm1, xmm2, 4",
        "roundss xmm2, dword ptr [rdi], 4",
        "roundsd xmm1, xmm2, 2",
        "roundsd xmm2, qword ptr [rdi], 2",
        "dpps xmm1, xmm2, 0xf7",
        "dpps xmm2, xmmword ptr [rdi], 0xf7",
        "dppd xmm1, xmm2, 0x31",
        "dppd xmm2, xmmword ptr [rdi], 0x31",
        "blendps xmm1, xmm2, 5",
        "blendps xmm2, xmmword ptr [rdi], 5",
        "blendpd xmm1, xmm2, 1",
        "blendpd xmm2, xmmword ptr [rdi], 1",
        "pblendw xmm1, xmm2, 0x5a",
        "pblendw xmm2, xmmword ptr [rdi], 0x5a",
        "palignr xmm1, xmm2, 5",
        "palignr xmm2, xmmword ptr [rdi], 5",
        "mpsadbw xmm1, xmm2, 5",
        "mpsadbw xmm2, xmmword ptr [rdi], 5",
        "insertps xmm1, xmm2, 0x1e",
        "insertps xmm2, dword ptr [rdi], 0x1e",
        "pclmulqdq xmm1, xmm2, 0x11",
        "pclmulqdq xmm2, xmmword ptr [rdi], 0x11",
        "aeskeygenassist xmm1, xmm2, 7",
        "aeskeygenassist xmm2, xmmword ptr [rdi], 7",
        "sha1rnds4 xmm1, xmm2, 2",
        "sha1rnds4 xmm2, xmmword ptr [rdi], 2",
        "pcmpistri xmm1, xmm2, 0x0c",
        "pcmpistri xmm2, xmmword ptr [rdi], 0x0c",
        "pcmpistrm xmm1, xmm2, 0x44",
        "pcmpistrm xmm2, xmmword ptr [rdi], 0x44",
        "pcmpestri xmm1, xmm2, 0x1a",
        "pcmpestri xmm2, xmmword ptr [rdi], 0x1a",
        "pcmpestrm xmm1, xmm2, 0x65",
        "pcmpestrm xmm2, xmmword ptr [rdi], 0x65",
        "movss xmm1, xmm2",
        "movsd xmm2, xmm3",
        "movss xmm1, dword ptr [rdi]",
        "movsd xmm1, qword ptr [rdi]",
        "movss dword ptr [rdi], xmm1",
        "movsd qword ptr [rdi], xmm2",
        "movups xmm1, xmmword ptr [rdi + 3]",
        "movaps xmm1, xmmword ptr [rdi + 16]",
        "movdqu xmmword ptr [rdi + 5], xmm2",
        "movapd xmmword ptr [rdi], xmm3",
        "movdqa xmm1, xmm3",
        "lddqu xmm1, xmmword ptr [rdi + 1]",
        "movntps xmmword ptr [rdi], xmm1",
        "movntdq xmmword ptr [rdi + 16], xmm1",
        "movntdqa xmm1, xmmword ptr [rdi]",
        "movq xmm1, qword ptr [rdi]",
        "movq xmm1, xmm2",
        "movq qword ptr [rdi], xmm1",
        "movd xmm1, eax",
        "movd ecx, xmm2",
        "movq xmm3, rdx",
        "movq rax, xmm1",
        "movd dword ptr [rdi], xmm1",
        "movlps xmm1, qword ptr [rdi]",
        "movhps xmm1, qword ptr [rdi]",
        "movlpd qword ptr [rdi], xmm1",
        "movhpd qword ptr [rdi], xmm1",
        "movhlps xmm1, xmm2",
        "movlhps xmm1, xmm2",
        "movmskps eax, xmm1",
        "movmskpd ecx, xmm2",
        "pmovmskb edx, xmm3",
        "pextrb eax, xmm1, 5",
        "pextrb byte ptr [rdi], xmm1, 9",
        "pextrw ecx, xmm1, 3",
        "pextrd edx, xmm2, 2",
        "pextrq rax, xmm2, 1",
        "extractps ecx, xmm2, 3",
        "pextrd dword ptr [rdi], xmm2, 1",
        "pinsrb xmm1, eax, 3",
        "pinsrw xmm1, ecx, 5",
        "pinsrd xmm1, edx, 2",
        "pinsrq xmm1, rax, 1",
        "pinsrw xmm1, word ptr [rdi], 2",
        "pinsrb xmm1, byte ptr [rdi], 11",
        "cvtsi2ss xmm1, eax",
        "cvtsi2sd xmm1, rcx",
        "cvtsi2sd xmm1, dword ptr [rdi]",
        "cvtss2si eax, xmm1",
        "cvtsd2si rdx, xmm1",
        "cvttss2si rcx, dword ptr [rdi]",
        "cvttsd2si eax, qword ptr [rdi]",
        "psllw xmm1, 3",
        "psrldq xmm1, 5",
        "pslldq xmm2, 9",
        "psrad xmm3, 31",
        "psrlq xmm1, 7",
        "paddb mm1, mm2",
        "pmaddwd mm1, qword ptr [rdi]",
        "pshufw mm1, mm2, 0x1b",
        "pmovmskb eax, mm1",
        "movd mm1, eax",
        "movq rax, mm2",
        "movq mm1, qword ptr [rdi]",
        "movq qword ptr [rdi], mm1",
        "psrlw mm1, 3",
        "pshufb mm1, mm2",
        "pinsrw mm1, eax, 1",
        "pextrw ecx, mm2, 2",
        "movntq qword ptr [rdi], mm1",
        "punpcklbw mm1, dword ptr [rdi]",
        "cvtpi2ps xmm1, mm1",
        "cvtps2pi mm1, xmm2",
        "cvttpd2pi mm2, xmm1",
        "cvtpi2pd xmm1, qword ptr [rdi]",
        "cvtpi2ps xmm1, qword ptr [rdi]",
        "movq2dq xmm1, mm1",
        "movdq2q mm1, xmm2",
        "emms",
        "movnti dword ptr [rdi], ecx",
        "movnti qword ptr [rdi + 8], rax",
        "maskmovq mm1, mm2",
        "maskmovdqu xmm1, xmm2",
    ]
}

#[rustfmt::skip]
fn vex_cases() -> Vec<Case> {
    cases![
        "vaddps xmm1, xmm2, xmm3",
        "vaddps xmm1, xmm2, xmmword ptr [rdi]",
        "vaddpd xmm1, xmm2, xmm3",
        "vaddpd xmm1, xmm2, xmmword ptr [rdi]",
        "vaddss xmm1, xmm2, xmm3",
        "vaddss xmm1, xmm2, dword ptr [rdi]",
        "vaddsd xmm1, xmm2, xmm3",
        "vaddsd xmm1, xmm2, qword ptr [rdi]",
        "vsubps xmm1, xmm2, xmm3",
        "vsubps xmm1, xmm2, xmmword ptr [rdi]",
        "vmulpd xmm1, xmm2, xmm3",
        "vmulpd xmm1, xmm2, xmmword ptr [rdi]",
        "vmulss xmm1, xmm2, xmm3",
        "vmulss xmm1, xmm2, dword ptr [rdi]",
        "vdivps xmm1, xmm2, xmm3",
        "vdivps xmm1, xmm2, xmmword ptr [rdi]",
        "vdivsd xmm1, xmm2, xmm3",
        "vdivsd xmm1, xmm2, qword ptr [rdi]",
        "vminps xmm1, xmm2, xmm3",
        "vminps xmm1, xmm2, xmmword ptr [rdi]",
        "vmaxpd xmm1, xmm2, xmm3",
        "vmaxpd xmm1, xmm2, xmmword ptr [rdi]",
        "vsqrtss xmm1, xmm2, xmm3",
        "vsqrtss xmm1, xmm2, dword ptr [rdi]",
        "vandnps xmm1, xmm2, xmm3",
        "vandnps xmm1, xmm2, xmmword ptr [rdi]",
        "vxorpd xmm1, xmm2, xmm3",
        "vxorpd xmm1, xmm2, xmmword ptr [rdi]",
        "vunpckhps xmm1, xmm2, xmm3",
        "vunpckhps xmm1, xmm2, xmmword ptr [rdi]",
        "vhaddpd xmm1, xmm2, xmm3",
        "vhaddpd xmm1, xmm2, xmmword ptr [rdi]",
        "vaddsubps xmm1, xmm2, xmm3",
        "vaddsubps xmm1, xmm2, xmmword ptr [rdi]",
        "vpaddb xmm1, xmm2, xmm3",
        "vpaddb xmm1, xmm2, xmmword ptr [rdi]",
        "vpsubw xmm1, xmm2, xmm3",
        "vpsubw xmm1, xmm2, xmmword ptr [rdi]",
        "vpmulld xmm1, xmm2, xmm3",
        "vpmulld xmm1, xmm2, xmmword ptr [rdi]",
        "vpshufb xmm1, xmm2, xmm3",
        "vpshufb xmm1, xmm2, xmmword ptr [rdi]",
        "vpackssdw xmm1, xmm2, xmm3",
        "vpackssdw xmm1, xmm2, xmmword ptr [rdi]",
        "vpunpckhwd xmm1, xmm2, xmm3",
        "vpunpckhwd xmm1, xmm2, xmmword ptr [rdi]",
        "vpcmpeqd xmm1, xmm2, xmm3",
        "vpcmpeqd xmm1, xmm2, xmmword ptr [rdi]",
        "vpcmpgtq xmm1, xmm2, xmm3",
        "vpcmpgtq xmm1, xmm2, xmmword ptr [rdi]",
        "vpand xmm1, xmm2, xmm3",
        "vpand xmm1, xmm2, xmmword ptr [rdi]",
        "vpor xmm1, xmm2, xmm3",
        "vpor xmm1, xmm2, xmmword ptr [rdi]",
        "vpxor xmm1, xmm2, xmm3",
        "vpxor xmm1, xmm2, xmmword ptr [rdi]",
        "vpandn xmm1, xmm2, xmm3",
        "vpandn xmm1, xmm2, xmmword ptr [rdi]",
        "vpsignd xmm1, xmm2, xmm3",
        "vpsignd xmm1, xmm2, xmmword ptr [rdi]",
        "vpmaddubsw xmm1, xmm2, xmm3",
        "vpmaddubsw xmm1, xmm2, xmmword ptr [rdi]",
        "vaesenc xmm1, xmm2, xmm3",
        "vaesenc xmm1, xmm2, xmmword ptr [rdi]",
        "vcvtss2sd xmm1, xmm2, xmm3",
        "vcvtss2sd xmm1, xmm2, dword ptr [rdi]",
        "vcvtsd2ss xmm1, xmm2, xmm3",
        "vcvtsd2ss xmm1, xmm2, qword ptr [rdi]",
        "vaddps ymm1, ymm2, ymm3",
        "vaddps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vaddpd ymm1, ymm2, ymm3",
        "vaddpd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vmulpd ymm1, ymm2, ymm3",
        "vmulpd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vsubps ymm1, ymm2, ymm3",
        "vsubps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vdivps ymm1, ymm2, ymm3",
        "vdivps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vminps ymm1, ymm2, ymm3",
        "vminps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vmaxpd ymm1, ymm2, ymm3",
        "vmaxpd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vunpckhps ymm1, ymm2, ymm3",
        "vunpckhps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vxorps ymm1, ymm2, ymm3",
        "vxorps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vandnps ymm1, ymm2, ymm3",
        "vandnps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vhaddpd ymm1, ymm2, ymm3",
        "vhaddpd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vaddsubps ymm1, ymm2, ymm3",
        "vaddsubps ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpaddb ymm1, ymm2, ymm3",
        "vpaddb ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpsubw ymm1, ymm2, ymm3",
        "vpsubw ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpmulld ymm1, ymm2, ymm3",
        "vpmulld ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpshufb ymm1, ymm2, ymm3",
        "vpshufb ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpackssdw ymm1, ymm2, ymm3",
        "vpackssdw ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpunpckhwd ymm1, ymm2, ymm3",
        "vpunpckhwd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpcmpeqd ymm1, ymm2, ymm3",
        "vpcmpeqd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpcmpgtq ymm1, ymm2, ymm3",
        "vpcmpgtq ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpand ymm1, ymm2, ymm3",
        "vpand ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpor ymm1, ymm2, ymm3",
        "vpor ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpxor ymm1, ymm2, ymm3",
        "vpxor ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpandn ymm1, ymm2, ymm3",
        "vpandn ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpsignd ymm1, ymm2, ymm3",
        "vpsignd ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpmaddubsw ymm1, ymm2, ymm3",
        "vpmaddubsw ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpsadbw ymm1, ymm2, ymm3",
        "vpsadbw ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpmuludq ymm1, ymm2, ymm3",
        "vpmuludq ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vpavgb ymm1, ymm2, ymm3",
        "vpavgb ymm3, ymm2, ymmword ptr [rdi + 1]",
        "vsqrtps ymm1, ymm2",
        "vsqrtps ymm1, ymmword ptr [rdi]",
        "vsqrtps xmm1, xmm2",
        "vsqrtpd ymm1, ymm2",
        "vsqrtpd ymm1, ymmword ptr [rdi]",
        "vsqrtpd xmm1, xmm2",
        "vcvtdq2ps ymm1, ymm2",
        "vcvtdq2ps ymm1, ymmword ptr [rdi]",
        "vcvtdq2ps xmm1, xmm2",
        "vcvtps2dq ymm1, ymm2",
        "vcvtps2dq ymm1, ymmword ptr [rdi]",
        "vcvtps2dq xmm1, xmm2",
        "vcvttps2dq ymm1, ymm2",
        "vcvttps2dq ymm1, ymmword ptr [rdi]",
        "vcvttps2dq xmm1, xmm2",
        "vmovshdup ymm1, ymm2",
        "vmovshdup ymm1, ymmword ptr [rdi]",
        "vmovshdup xmm1, xmm2",
        "vmovddup ymm1, ymm2",
        "vmovddup ymm1, ymmword ptr [rdi]",
        "vmovddup xmm1, xmm2",
        "vrcpps ymm1, ymm2",
        "vrcpps ymm1, ymmword ptr [rdi]",
        "vrcpps xmm1, xmm2",
        "vptest ymm1, ymm2",
        "vptest ymm1, ymmword ptr [rdi]",
        "vptest xmm1, xmm2",
        "vtestps ymm1, ymm2",
        "vtestps ymm1, ymmword ptr [rdi]",
        "vtestps xmm1, xmm2",
        "vtestpd ymm1, ymm2",
        "vtestpd ymm1, ymmword ptr [rdi]",
        "vtestpd xmm1, xmm2",
        "vpabsd ymm1, ymm2",
        "vpabsd ymm1, ymmword ptr [rdi]",
        "vpabsd xmm1, xmm2",
        "vfmadd132ps xmm1, xmm2, xmm3",
        "vfmadd132ps xmm1, xmm2, xmmword ptr [rdi]",
        "vfmadd132ps ymm1, ymm2, ymm3",
        "vfmadd132ps ymm1, ymm2, ymmword ptr [rdi]",
        "vfmadd213pd xmm1, xmm2, xmm3",
        "vfmadd213pd xmm1, xmm2, xmmword ptr [rdi]",
        "vfmadd213pd ymm1, ymm2, ymm3",
        "vfmadd213pd ymm1, ymm2, ymmword ptr [rdi]",
        "vfmadd231ss xmm1, xmm2, xmm3",
        "vfmadd231ss xmm1, xmm2, dword ptr [rdi]",
        "vfnmadd231sd xmm1, xmm2, xmm3",
        "vfnmadd231sd xmm1, xmm2, qword ptr [rdi]",
        "vfmsub213ps xmm1, xmm2, xmm3",
        "vfmsub213ps xmm1, xmm2, xmmword ptr [rdi]",
        "vfmsub213ps ymm1, ymm2, ymm3",
        "vfmsub213ps ymm1, ymm2, ymmword ptr [rdi]",
        "vfnmsub132pd xmm1, xmm2, xmm3",
        "vfnmsub132pd xmm1, xmm2, xmmword ptr [rdi]",
        "vfnmsub132pd ymm1, ymm2, ymm3",
        "vfnmsub132pd ymm1, ymm2, ymmword ptr [rdi]",
        "vfmaddsub213ps xmm1, xmm2, xmm3",
        "vfmaddsub213ps xmm1, xmm2, xmmword ptr [rdi]",
        "vfmaddsub213ps ymm1, ymm2, ymm3",
        "vfmaddsub213ps ymm1, ymm2, ymmword ptr [rdi]",
        "vfmsubadd231pd xmm1, xmm2, xmm3",
        "vfmsubadd231pd xmm1, xmm2, xmmword ptr [rdi]",
        "vfmsubadd231pd ymm1, ymm2, ymm3",
        "vfmsubadd231pd ymm1, ymm2, ymmword ptr [rdi]",
        "vcvtph2ps xmm1, xmm2",
        "vcvtph2ps ymm1, xmmword ptr [rdi]",
        "vcvtps2ph xmm1, ymm2, 0",
        "vcvtps2ph xmmword ptr [rdi], ymm2, 4",
        "vcvtps2ph qword ptr [rdi], xmm2, 1",
        "vcvtps2pd ymm1, xmm2",
        "vcvtpd2ps xmm1, ymm2",
        "vcvttpd2dq xmm1, ymm2",
        "vcvtdq2pd ymm1, xmmword ptr [rdi]",
        "vmovups ymm1, ymmword ptr [rdi + 3]",
        "vmovaps ymm1, ymmword ptr [rdi]",
        "vmovdqu ymmword ptr [rdi + 1], ymm2",
        "vmovdqa ymm2, ymm3",
        "vmovups xmm1, xmm2",
        "vmovdqa xmm1, xmmword ptr [rdi]",
        "vmovss xmm1, dword ptr [rdi]",
        "vmovss xmm1, xmm2, xmm3",
        "vmovsd qword ptr [rdi], xmm1",
        "vmovd xmm1, eax",
        "vmovq rax, xmm2",
        "vmovq xmm1, xmm2",
        "vmovq xmm1, qword ptr [rdi]",
        "vmovd dword ptr [rdi], xmm2",
        "vmovntps ymmword ptr [rdi], ymm1",
        "vmovlps xmm1, xmm2, qword ptr [rdi]",
        "vmovhpd qword ptr [rdi], xmm1",
        "vbroadcastss ymm1, xmm2",
        "vbroadcastss ymm1, dword ptr [rdi]",
        "vbroadcastsd ymm1, qword ptr [rdi]",
        "vbroadcastf128 ymm1, xmmword ptr [rdi]",
        "vpbroadcastb xmm1, byte ptr [rdi]",
        "vpbroadcastw ymm1, xmm2",
        "vperm2f128 ymm1, ymm2, ymm3, 0x21",
        "vpermq ymm1, ymm2, 0x1b",
        "vpermd ymm1, ymm2, ymm3",
        "vpermps ymm1, ymm2, ymmword ptr [rdi]",
        "vpermilps ymm1, ymm2, 0x1b",
        "vpermilpd xmm1, xmm2, xmm3",
        "vinsertf128 ymm1, ymm2, xmm3, 1",
        "vextractf128 xmm1, ymm2, 1",
        "vextracti128 xmmword ptr [rdi], ymm2, 1",
        "vinserti128 ymm1, ymm2, xmmword ptr [rdi], 0",
        "vblendvps ymm1, ymm2, ymm3, ymm0",
        "vpblendvb xmm1, xmm2, xmm3, xmm0",
        "vpblendd ymm1, ymm2, ymm3, 0x5a",
        "vshufps ymm1, ymm2, ymm3, 0x1b",
        "vpalignr ymm1, ymm2, ymm3, 5",
        "vroundps ymm1, ymm2, 3",
        "vcmpps ymm1, ymm2, ymm3, 0x1d",
        "vcmpsd xmm1, xmm2, xmm3, 0x0a",
        "vdpps ymm1, ymm2, ymm3, 0xf1",
        "vmpsadbw ymm1, ymm2, ymm3, 5",
        "vpsllvd ymm1, ymm2, ymm3",
        "vpsrlvq xmm1, xmm2, xmm3",
        "vpsravd ymm1, ymm2, ymm3",
        "vpsllw ymm1, ymm2, 3",
        "vpsrldq ymm1, ymm2, 5",
        "vpsrlq ymm1, ymm2, xmm3",
        "vpmovmskb eax, ymm2",
        "vmovmskps ecx, ymm2",
        "vpmovsxbw ymm1, xmm2",
        "vpextrq rax, xmm2, 1",
        "vpinsrd xmm1, xmm2, eax, 3",
        "vcvtsi2sd xmm1, xmm2, rax",
        "vcvttsd2si rcx, xmm2",
        "vcvtsi2ss xmm1, xmm2, dword ptr [rdi]",
        "vucomiss xmm1, xmm2",
        "vcomisd xmm1, qword ptr [rdi]",
        "vpcmpistri xmm1, xmm2, 0x0c",
        "vpclmulqdq xmm1, xmm2, xmm3, 1",
        "vaesimc xmm1, xmm2",
        "vzeroupper",
        "vmaskmovps ymm1, ymm2, ymmword ptr [rdi]",
        "vmaskmovpd xmmword ptr [rdi], xmm1, xmm2",
        "vpmaskmovd ymmword ptr [rdi], ymm2, ymm3",
        "vpmaskmovq xmm1, xmm2, xmmword ptr [rdi]",
        "vlddqu ymm1, ymmword ptr [rdi + 7]",
        "vmaskmovdqu xmm1, xmm2",
    ]
}

fn random_native(random: &mut Random) -> Native {
    let mut state = Native {
        fx: [0; 512],
        memory: [0; 64],
        ymm: [[0; 32]; 4],
        gpr: [0; 3],
        mxcsr: 0x1f80,
        host_mxcsr: 0x1f80,
        flags: 0,
        code: [0; 2],
    };
    random.fill(&mut state.memory);
    state.ymm.iter_mut().for_each(|r| random.fill(r));
    state.gpr = std::array::from_fn(|_| random.interesting());
    state.flags = 2 | random.next() & flag::ARITHMETIC;
    let mode = random.next();
    state.mxcsr |= (mode as u32 & 3) << 13 | (mode as u32 >> 8 & 0x8040) | ((mode >> 40) as u32 & 0x3f);
    state.fx[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    state.fx[4] = (mode >> 20) as u8;
    state.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    state.fx[3] = (mode >> 28) as u8 & 0x38;
    for slot in 0..8 {
        let value = random.interesting().to_le_bytes();
        state.fx[32 + 16 * slot..][..8].copy_from_slice(&value);
        state.fx[40 + 16 * slot..][..2].fill(0xff);
    }
    state
}

fn load(fixture: &mut Fixture, state: &Native) {
    let cpu = &mut fixture.cpu;
    cpu.xsave.0[..160].copy_from_slice(&state.fx[..160]);
    for (i, value) in state.ymm.iter().enumerate() {
        cpu.xsave.set_ymm(i, value);
    }
    cpu.xsave.set_mxcsr(state.mxcsr);
    cpu.gpr[..3].copy_from_slice(&state.gpr);
    cpu.gpr[7] = DATA;
    cpu.rflags = state.flags;
    fixture.store(DATA, &state.memory);
}

fn unload(fixture: &mut Fixture, like: &Native) -> Native {
    let mut state = like.clone();
    let memory = fixture.load(DATA);
    let cpu = &mut fixture.cpu;
    state.memory = memory;
    state.fx[..24].copy_from_slice(&cpu.xsave.0[..24]);
    state.fx[32..160].copy_from_slice(&cpu.xsave.0[32..160]);
    state.ymm = std::array::from_fn(|i| cpu.xsave.ymm(i));
    state.mxcsr = cpu.xsave.mxcsr();
    state.gpr.copy_from_slice(&cpu.gpr[..3]);
    state.flags = cpu.rflags;
    state
}

/// Forgets what is not compared: the rest of the FXSAVE image and flags that do not concern us.
fn comparable(mut state: Native) -> Native {
    state.fx[24..32].fill(0);
    state.fx[160..].fill(0);
    state.flags &= flag::ARITHMETIC;
    state
}

fn code_of(state: &Native) -> &'static [u8] {
    let length = state.code[1] - state.code[0];
    // SAFETY: both are addresses of labels around one instruction of this program's code.
    unsafe { std::slice::from_raw_parts(state.code[0] as *const u8, length) }
}

fn compare(cases: &[Case], rounds: u64, seed: u64) {
    let mut fixture = Fixture::new();
    let mut random = Random(seed);
    for round in 0..rounds {
        for case in cases {
            let before = random_native(&mut random);
            let mut native = before.clone();
            (case.native)(&mut native);
            let code = code_of(&native);
            load(&mut fixture, &before);
            let outcome = fixture.run(code);
            assert_eq!(outcome, Ok(()), "{} round {round} seed {seed:#x} code {code:02x?}", case.text);
            let ours = unload(&mut fixture, &native);
            let (ours, native) = (comparable(ours), comparable(native));
            assert!(
                ours == native,
                "{} round {round} seed {seed:#x} code {code:02x?}\nbefore {before:x?}\nours   {ours:x?}\nnative {native:x?}",
                case.text
            );
        }
    }
}

fn host_has_avx2() -> bool {
    let all = ["avx2", "fma", "f16c", "aes", "sha", "pclmulqdq", "sse4.2"];
    let has = |name: &str| match name {
        "avx2" => std::arch::is_x86_feature_detected!("avx2"),
        "fma" => std::arch::is_x86_feature_detected!("fma"),
        "f16c" => std::arch::is_x86_feature_detected!("f16c"),
        "aes" => std::arch::is_x86_feature_detected!("aes"),
        "sha" => std::arch::is_x86_feature_detected!("sha"),
        "pclmulqdq" => std::arch::is_x86_feature_detected!("pclmulqdq"),
        _ => std::arch::is_x86_feature_detected!("sse4.2"),
    };
    all.into_iter().all(has)
}

#[test]
fn legacy_vector_instructions_agree_with_the_host() {
    if host_has_avx2() {
        compare(&legacy_cases(), 60, 0x5eed_0001);
    }
}

#[test]
fn vex_instructions_agree_with_the_host() {
    if host_has_avx2() {
        compare(&vex_cases(), 60, 0x5eed_0002);
    }
}

#[test]
fn unmasked_exceptions_fault_exactly_when_the_host_raises_their_flag() {
    if !host_has_avx2() {
        return;
    }
    let cases = cases![
        "addps xmm1, xmm2",
        "divpd xmm1, xmmword ptr [rdi]",
        "sqrtss xmm1, xmm2",
        "comisd xmm1, xmm2",
        "cvttsd2si rax, xmm1",
        "cvtps2dq xmm1, xmm2",
        "vmulps ymm1, ymm2, ymm3",
        "vcvtps2ph xmmword ptr [rdi], ymm2, 4",
        "vfmadd231pd ymm1, ymm2, ymm3",
        "cvtps2pi mm1, xmm2",
    ];
    let mut fixture = Fixture::new();
    let (mut random, mut faults, mut passes) = (Random(0x5eed_0003), 0, 0);
    for _ in 0..300 {
        for case in &cases {
            let mut before = random_native(&mut random);
            before.mxcsr &= !0x3f;
            let mut native = before.clone();
            (case.native)(&mut native);
            // Underflow is detected differently when unmasked, so its mask stays.
            let unmasked = random.next() as u32 & 0x2f;
            before.mxcsr &= !(unmasked << 7);
            load(&mut fixture, &before);
            let outcome = fixture.run(code_of(&native));
            let after = comparable(unload(&mut fixture, &native));
            if native.mxcsr & unmasked == 0 {
                passes += 1;
                native.mxcsr = before.mxcsr | native.mxcsr & 0x3f;
                assert_eq!(outcome, Ok(()), "{}", case.text);
                assert!(after == comparable(native), "{}", case.text);
            } else {
                faults += 1;
                assert_eq!(outcome, Err(Exception::fault(19)), "{}", case.text);
                assert_ne!(after.mxcsr & unmasked, 0, "{}: the flag is set", case.text);
                let mut unchanged = before.clone();
                (unchanged.mxcsr, unchanged.code) = (after.mxcsr, after.code);
                if case.text.contains(" mm") {
                    // The transition to MMX comes before the exception.
                    unchanged.fx = after.fx;
                }
                assert!(
                    after == comparable(unchanged),
                    "{}: state changed\n{before:x?}\n{after:x?}",
                    case.text
                );
            }
        }
    }
    assert!(faults > 300 && passes > 300, "{faults} faults, {passes} passes");
}
