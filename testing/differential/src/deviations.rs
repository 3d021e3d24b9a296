//! Where the reference emulator is known to differ from the architecture.
//!
//! A case that falls under one of these is held only against the written expectation.

/// One known difference.
pub struct Deviation {
    /// What the names of the cases contain.
    pub cases: &'static [&'static str],
    /// How the event of our line and of the reference's must begin; empty means in any way.
    pub events: (&'static str, &'static str),
    /// What the reference does.
    pub what: &'static str,
    /// Where the manuals say otherwise.
    pub manual: &'static str,
}

const ANY: (&str, &str) = ("", "");

/// All of them.
pub const KNOWN: &[Deviation] = &[
    Deviation {
        cases: &["ltr 0 cpl0", "ltr 3 cpl0", "Ltr 0 ", "Ltr 3 "],
        events: ANY,
        what: "LTR accepts a null selector outside 64-bit mode",
        manual: "SDM vol. 2, LTR: #GP(0) if the source operand is null",
    },
    Deviation {
        cases: &["gate 84 ", "gate e4 "],
        events: ANY,
        what: "a 16-bit call gate uses all 32 bits of its offset",
        manual: "SDM vol. 2, CALL: a gate's 16-bit offset is the instruction pointer ANDed with FFFFH",
    },
    Deviation {
        cases: &["to 88 cpl3"],
        events: ANY,
        what: "a call gate to a conforming segment switches to its privilege level",
        manual: "SDM vol. 2, CALL: more privilege only if the segment is non-conforming and DPL < CPL",
    },
    Deviation {
        cases: &["int1"],
        events: ANY,
        what: "INT1 is an undefined opcode",
        manual: "SDM vol. 2, INT n/INTO/INT3/INT1: INT1 raises #DB as a trap",
    },
    Deviation {
        cases: &["mov ss,3 cpl0", "iretq to 78 with ss 3"],
        events: ANY,
        what: "a null SS may have any RPL in 64-bit mode",
        manual: "SDM vol. 2, MOV and IRET: #GP if the RPL of a null selector for SS is not CPL",
    },
    Deviation {
        cases: &["upper 800"],
        events: ANY,
        what: "presence is looked at before the type field of a 16-byte gate's upper half",
        manual: "SDM vol. 3, 6.8.3.1: #GP if the upper type field is not zero; the order is not given",
    },
    Deviation {
        cases: &["lar lsl verr verw 68", "Inspect 68 ", "with upper type "],
        events: ANY,
        what: "LAR and LSL ignore the type field of a 16-byte descriptor's upper half",
        manual: "APM vol. 2, 4.8.3: the field must be zero",
    },
    Deviation {
        cases: &["long int "],
        events: ANY,
        what: "the error code of a 64-bit IDT entry holds twice the vector",
        manual: "SDM vol. 3, 6.13: the index field is the vector",
    },
    Deviation {
        cases: &["syscall mask"],
        events: ANY,
        what: "SYSCALL loses the arithmetic flags",
        manual: "SDM vol. 2, SYSCALL: only the flags in IA32_FMASK are cleared",
    },
    Deviation {
        cases: &["sysret all flags"],
        events: ANY,
        what: "SYSRET leaves AC, VIF and VIP alone",
        manual: "SDM vol. 2, SYSRET: RFLAGS is R11 AND 3C7FD7H, with bit 1 set",
    },
    Deviation {
        cases: &["efer ", "msr 12345678", "msr c0000100 8", "msr c0000102 8", "msr c0000082 8"],
        events: ANY,
        what: "reserved bits of EFER, unknown MSRs and non-canonical values are accepted",
        manual: "SDM vol. 2, WRMSR: #GP(0) for each",
    },
    Deviation {
        cases: &[
            "pte 8000000000007 ",
            "pte 8000000000001 ",
            "pde reserved",
            "pde large reserved",
            "pdpte reserved",
            "pml4e large",
        ],
        events: ANY,
        what: "a page fault for a reserved bit has P clear in its error code",
        manual: "SDM vol. 3, 4.7: RSVD is set only for present entries, with P",
    },
    Deviation {
        cases: &["mov cr8,", "mov dr6,", "mov dr7,"],
        events: ANY,
        what: "reserved bits of CR8 and DR6 are taken, DR7.GD is ignored",
        manual: "SDM vol. 3, 2.5 and 18.2: #GP(0) for CR8 above 15; DR6 bit 12 reads as zero; #DB for DR7.GD",
    },
    Deviation {
        cases: &["to a non-canonical address", "through a non-canonical rsp"],
        events: ANY,
        what: "a branch is taken before its target is checked; stack references raise #GP",
        manual: "SDM vol. 2, JMP, CALL, RET: #GP(0) of the branch; vol. 1, 3.3.7.1: #SS for stack references",
    },
    Deviation {
        cases: &["lldt present with a non-canonical base"],
        events: ANY,
        what: "LLDT takes any base",
        manual: "APM vol. 3, LLDT: #GP(selector) if the descriptor's base is not canonical",
    },
    Deviation {
        cases: &["general detect"],
        events: ANY,
        what: "DR7.GD is ignored",
        manual: "SDM vol. 3, 18.2.4: #DB before the MOV, DR6.BD set",
    },
    Deviation {
        cases: &["sysenter cs 3", "sysexit cs 3"],
        events: ANY,
        what: "the RPL bits of IA32_SYSENTER_CS count when it is compared with null",
        manual: "SDM vol. 2, SYSENTER and SYSEXIT: #GP(0) if IA32_SYSENTER_CS[15:2] = 0",
    },
    Deviation {
        cases: &["mov cr0,"],
        events: ANY,
        what: "invalid combinations of CR0.NW and CD are accepted",
        manual: "SDM vol. 2, MOV to control registers: #GP(0) if NW is set and CD clear",
    },
    Deviation {
        cases: &["task with trap flag"],
        events: ANY,
        what: "the T flag of a TSS is ignored",
        manual: "SDM vol. 3, 18.3.1.5: #DB after the switch, DR6.BT set",
    },
    Deviation {
        cases: &["task with ", "jmp far e8", "call far e8", "gate e1 "],
        events: ANY,
        what: "faults of a task switch are delivered on a stack segment that was not checked",
        manual: "SDM vol. 3, 8.3: exceptions after the commit point come in the new task, whose SS must be valid to take them",
    },
    Deviation {
        cases: &["Call 100 of ", "Call 103 of ", "Call 108 of ", "Call 10b of "],
        events: ("int41 8b:", "int41 88:"),
        what: "a call gate to a conforming segment switches to its privilege level",
        manual: "SDM vol. 2, CALL: more privilege only if the segment is non-conforming and DPL < CPL",
    },
    Deviation {
        cases: &["beyond the limit", "stosb at the limit", "lodsw meets the limit"],
        events: ANY,
        what: "segment limits are not checked",
        manual: "SDM vol. 3, 5.3: #GP, or #SS for the stack segment, beyond the limit; 21.3: also in real mode",
    },
    Deviation {
        cases: &["les at fffe wraps"],
        events: ANY,
        what: "the selector of a far pointer in memory is read at an address that does not wrap",
        manual: "SDM vol. 1, 3.7.5: with 16-bit addresses the effective address is cut to 16 bits; the host agrees",
    },
    Deviation {
        cases: &["sgdt 16"],
        events: ANY,
        what: "SGDT with 16-bit operands stores 24 bits of the base",
        manual: "APM vol. 3, SGDT: all 32 bits are stored; the SDM's zeros are not what its processors store",
    },
    Deviation {
        cases: &["unreal ss pushes"],
        events: ANY,
        what: "an interrupt in real mode pushes through SP whatever the stack segment's size",
        manual: "SDM vol. 1, 6.2.3: the B flag of the stack segment gives the size of the stack pointer",
    },
    Deviation {
        cases: &["idiv of the lowest number"],
        events: ANY,
        what: "the emulator itself dies of the division",
        manual: "SDM vol. 2, IDIV: #DE if the quotient does not fit",
    },
    Deviation {
        cases: &["step sti"],
        events: ANY,
        what: "STI delays the single-step trap",
        manual: "SDM vol. 2, STI: external, maskable interrupts are delayed; vol. 3, 6.8.3: #DB by MOV SS alone",
    },
    Deviation {
        cases: &["8f /1", "c6 /1"],
        events: ("#UD", ""),
        what: "undefined values of ModRM's reg field are ignored",
        manual: "SDM vol. 2, A.4, table A-6: groups 1A and 11 hold one instruction each",
    },
    Deviation {
        cases: &["lock mov", "lock test", "lock bt "],
        events: ("#UD", ""),
        what: "LOCK is ignored by instructions that do not take it",
        manual: "SDM vol. 2, LOCK: #UD unless before one of the instructions named there",
    },
    Deviation {
        cases: &["f6 /1 is test"],
        events: ("", "#UD"),
        what: "F6 and F7 with 1 in ModRM's reg field are undefined",
        manual: "APM vol. 3, A.1, table A-6: TEST; the SDM leaves the place empty, its processors do the same",
    },
    Deviation {
        cases: &["rex before"],
        events: ANY,
        what: "a REX prefix counts that does not stand directly before the opcode",
        manual: "SDM vol. 2, 2.2.1: it is ignored then",
    },
    Deviation {
        cases: &["emms with"],
        events: ANY,
        what: "EMMS is executed whatever CR0.EM and TS are",
        manual: "SDM vol. 2, EMMS: #UD if CR0.EM is set, #NM if CR0.TS is",
    },
    Deviation {
        cases: &["add to an absent page"],
        events: ("#PF(2)", "#PF(0)"),
        what: "an instruction that reads and writes takes the page fault of a read",
        manual: "SDM vol. 3, 4.7: W/R tells what the access was; such instructions access for writing",
    },
    Deviation {
        cases: &["far jump marks a code segment accessed"],
        events: ANY,
        what: "far transfers do not set the accessed bit of code segments",
        manual: "SDM vol. 3, 3.4.5.1: the processor sets it whenever it loads the segment's selector",
    },
    Deviation {
        cases: &["pdpte has no accessed bit"],
        events: ANY,
        what: "page-directory-pointer entries of PAE paging get accessed bits",
        manual: "SDM vol. 3, 4.8: such entries have none",
    },
    Deviation {
        cases: &["unaligned access beside a breakpoint"],
        events: ("int41", "#DB"),
        what: "an unaligned access to a page with a data breakpoint is made of two aligned ones",
        manual: "SDM vol. 3, 18.2.5: a breakpoint is met by bytes that the access touches",
    },
    Deviation {
        cases: &["flags of a task left by a call"],
        events: ANY,
        what: "a task switch by JMP or CALL saves flags of an earlier instruction",
        manual: "SDM vol. 3, 8.3: EFLAGS is saved as it is",
    },
    Deviation {
        cases: &["cmpxchg8b keeps all flags"],
        events: ANY,
        what: "CMPXCHG8B takes flags of an earlier instruction",
        manual: "SDM vol. 2, CMPXCHG8B: CF, PF, AF, SF and OF are unaffected",
    },
    Deviation {
        cases: &["shld by an immediate relative to rip"],
        events: ANY,
        what: "the address counts from before the immediate",
        manual: "SDM vol. 2, 2.2.1.6: it is relative to the next instruction",
    },
    Deviation {
        cases: &["xsetbv "],
        events: ("#UD", "#GP(0)"),
        what: "XSETBV looks at CPL before it looks at CR4.OSXSAVE",
        manual: "SDM vol. 2, XSETBV: #UD if CR4.OSXSAVE is clear; vol. 3, 6.9: opcode faults come before privilege",
    },
    Deviation {
        cases: &["xorps"],
        events: ("#UD", "#NM"),
        what: "CR0.TS is looked at before CR0.EM",
        manual: "SDM vol. 3, chapter 14, table of OSFXSR, EM and TS: with EM an SSE instruction raises #UD whatever TS is",
    },
];

impl Deviation {
    fn explains(&self, name: &str, ours: Option<&str>, theirs: Option<&str>) -> bool {
        let begins = |line: Option<&str>, start: &str| {
            let event =
                line.and_then(|line| line.strip_prefix(name)).and_then(|line| line.strip_prefix(": "));
            start.is_empty() || event.is_some_and(|event| event.starts_with(start))
        };
        self.cases.iter().any(|part| name.contains(part))
            && begins(ours, self.events.0)
            && begins(theirs, self.events.1)
    }
}

/// The deviation that explains how differently a case of this name ended, if one does.
pub fn explaining(name: &str, ours: Option<&str>, theirs: Option<&str>) -> Option<&'static Deviation> {
    KNOWN.iter().find(|deviation| deviation.explains(name, ours, theirs))
}
