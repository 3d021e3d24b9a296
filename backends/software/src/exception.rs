//! Exceptions and interrupts as the instruction handlers report them.

/// What an instruction handler returns instead of finishing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// A fault, with an error code where the vector pushes one. RIP still points at the instruction.
    Fault {
        /// Vector 0 to 31.
        vector: u8,
        /// Error code.
        error_code: Option<u32>,
    },
    /// A page fault. CR2 is set on delivery.
    PageFault {
        /// Linear address.
        address: u64,
        /// Error code (P, W/R, U/S, RSVD, I/D).
        error_code: u32,
    },
    /// INT n, INT3, INTO, INT1 executed: delivered with the RIP of the next instruction.
    Software {
        /// Vector.
        vector: u8,
        /// Which instruction.
        source: SoftwareInterrupt,
    },
    /// A #DB trap raised by the finished instruction (task switch T bit, data or I/O breakpoint): RIP moves on.
    DebugTrap {
        /// DR6 bits to set.
        dr6: u64,
    },
}

/// The instruction behind a software interrupt (it matters for privilege checks and error codes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SoftwareInterrupt {
    /// INT n.
    IntN,
    /// INT3.
    Int3,
    /// INTO.
    Into,
    /// INT1 (ICEBP).
    Int1,
}

/// Vectors of the architecture's exceptions.
#[allow(missing_docs)]
pub mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

impl Exception {
    /// #UD.
    pub const UD: Self = Self::fault(vector::UD);
    /// #NM.
    pub const NM: Self = Self::fault(vector::NM);
    /// #GP(0).
    pub const GP0: Self = Self::with_code(vector::GP, 0);
    /// #SS(0).
    pub const SS0: Self = Self::with_code(vector::SS, 0);
    /// #DE.
    pub const DE: Self = Self::fault(vector::DE);

    /// A fault without an error code.
    pub const fn fault(vector: u8) -> Self {
        Self::Fault { vector, error_code: None }
    }
    /// A fault with an error code.
    pub const fn with_code(vector: u8, code: u32) -> Self {
        Self::Fault { vector, error_code: Some(code) }
    }
}

/// What every instruction handler returns.
pub type Outcome<T = ()> = Result<T, Exception>;
