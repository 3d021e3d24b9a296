//! The units against the host: every instruction of the tables runs natively and through [`execute`] on the
//! same operands; registers, memory, flags and MXCSR must agree. Exceptions and state management are checked
//! against written expectations.

// UNSAFETY: runs the reference instructions as inline assembly.
#![allow(unsafe_code)]

mod coverage;
mod faults;
mod fixture;
mod speed;
mod state_images;
mod vector_cases;
mod x87_cases;

use fixture::Fixture;
