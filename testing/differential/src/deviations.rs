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
