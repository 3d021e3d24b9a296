//! Where the reference emulator is known to differ from the architecture.
//!
//! A case that falls under one of these is held only against the written expectation.

/// One known difference.
pub struct Deviation {
    /// What the names of the cases contain.
    pub cases: &'static [&'static str],
    /// What the reference does.
    pub what: &'static str,
    /// Where the manuals say otherwise.
    pub manual: &'static str,
}

/// All of them.
pub const KNOWN: &[Deviation] = &[
    Deviation {
        cases: &["ltr 0 cpl0", "ltr 3 cpl0", "Ltr 0 ", "Ltr 3 "],
        what: "LTR accepts a null selector outside 64-bit mode",
        manual: "SDM vol. 2, LTR: #GP(0) if the source operand is null",
    },
    Deviation {
        cases: &["gate 84 ", "gate e4 "],
        what: "a 16-bit call gate uses all 32 bits of its offset",
        manual: "SDM vol. 2, CALL: a gate's 16-bit offset is the instruction pointer ANDed with FFFFH",
    },
    Deviation {
        cases: &["to 88 cpl3"],
        what: "a call gate to a conforming segment switches to its privilege level",
        manual: "SDM vol. 2, CALL: more privilege only if the segment is non-conforming and DPL < CPL",
    },
    Deviation {
        cases: &["int1 "],
        what: "INT1 is an undefined opcode",
        manual: "SDM vol. 2, INT n/INTO/INT3/INT1: INT1 raises #DB as a trap",
    },
    Deviation {
        cases: &["mov ss,3 cpl0", "iretq to 78 with ss 3"],
        what: "a null SS may have any RPL in 64-bit mode",
        manual: "SDM vol. 2, MOV and IRET: #GP if the RPL of a null selector for SS is not CPL",
    },
    Deviation {
        cases: &["upper 800"],
        what: "presence is looked at before the type field of a 16-byte gate's upper half",
        manual: "SDM vol. 3, 6.8.3.1: #GP if the upper type field is not zero; the order is not given",
    },
    Deviation {
        cases: &["lar lsl verr verw 68", "Inspect 68 "],
        what: "LSL ignores the type field of a 16-byte descriptor's upper half",
        manual: "APM vol. 2, 4.8.3: the field must be zero",
    },
    Deviation {
        cases: &["long int "],
        what: "the error code of a 64-bit IDT entry holds twice the vector",
        manual: "SDM vol. 3, 6.13: the index field is the vector",
    },
    Deviation {
        cases: &["syscall mask"],
        what: "SYSCALL loses the arithmetic flags",
        manual: "SDM vol. 2, SYSCALL: only the flags in IA32_FMASK are cleared",
    },
    Deviation {
        cases: &["sysret all flags"],
        what: "SYSRET leaves AC, VIF and VIP alone",
        manual: "SDM vol. 2, SYSRET: RFLAGS is R11 AND 3C7FD7H, with bit 1 set",
    },
    Deviation {
        cases: &["efer ", "msr 12345678", "msr c0000100 8", "msr c0000102 8", "msr c0000082 8"],
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
        what: "a page fault for a reserved bit has P clear in its error code",
        manual: "SDM vol. 3, 4.7: RSVD is set only for present entries, with P",
    },
    Deviation {
        cases: &["mov cr8,", "mov dr6,", "mov dr7,"],
        what: "reserved bits of CR8 and DR6 are taken, DR7.GD is ignored",
        manual: "SDM vol. 3, 2.5 and 18.2: #GP(0) for CR8 above 15; DR6 bit 12 reads as zero; #DB for DR7.GD",
    },
    Deviation {
        cases: &["to a non-canonical address", "through a non-canonical rsp"],
        what: "a branch is taken before its target is checked; stack references raise #GP",
        manual: "SDM vol. 2, JMP, CALL, RET: #GP(0) of the branch; vol. 1, 3.3.7.1: #SS for stack references",
    },
    Deviation {
        cases: &["lldt present with a non-canonical base"],
        what: "LLDT takes any base",
        manual: "APM vol. 3, LLDT: #GP(selector) if the descriptor's base is not canonical",
    },
    Deviation {
        cases: &["general detect"],
        what: "DR7.GD is ignored",
        manual: "SDM vol. 3, 18.2.4: #DB before the MOV, DR6.BD set",
    },
    Deviation {
        cases: &["sysenter cs 3", "sysexit cs 3"],
        what: "the RPL bits of IA32_SYSENTER_CS count when it is compared with null",
        manual: "SDM vol. 2, SYSENTER and SYSEXIT: #GP(0) if IA32_SYSENTER_CS[15:2] = 0",
    },
    Deviation {
        cases: &["mov cr0,"],
        what: "invalid combinations of CR0.NW and CD are accepted",
        manual: "SDM vol. 2, MOV to control registers: #GP(0) if NW is set and CD clear",
    },
    Deviation {
        cases: &["task with trap flag"],
        what: "the T flag of a TSS is ignored",
        manual: "SDM vol. 3, 18.3.1.5: #DB after the switch, DR6.BT set",
    },
    Deviation {
        cases: &["task with ", "jmp far e8", "call far e8", "gate e1 "],
        what: "faults of a task switch are delivered on a stack segment that was not checked",
        manual: "SDM vol. 3, 8.3: exceptions after the commit point come in the new task, whose SS must be valid to take them",
    },
];

/// The deviation that a case falls under.
pub fn of(name: &str) -> Option<&'static Deviation> {
    KNOWN.iter().find(|d| d.cases.iter().any(|part| name.contains(part)))
}
