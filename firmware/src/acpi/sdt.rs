//! The header that all description tables share (ACPI 6.5, section 5.2.6).

use crate::bytes::{checksum, put};

/// OEM identifier in every table.
pub(super) const OEM_ID: [u8; 6] = *b"ATOLL ";
/// OEM table identifier in every table: the machine.
const OEM_TABLE_ID: [u8; 8] = *b"ATOLL-1 ";
/// OEM revision in every table.
const OEM_REVISION: u32 = 1;
/// Who made the table.
const CREATOR_ID: [u8; 4] = *b"ATOL";
/// Revision of who made it.
const CREATOR_REVISION: u32 = 1;
/// Size of the header in bytes.
pub(super) const HEADER_SIZE: usize = 36;

/// A table of `signature` and `revision` with `body` behind the header; length and checksum are filled in.
pub(super) fn table(signature: &[u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend_from_slice(body);
    let length = bytes.len() as u32;
    put(&mut bytes, 0, signature);
    put(&mut bytes, 4, &length.to_le_bytes());
    put(&mut bytes, 8, &[revision]);
    put(&mut bytes, 10, &OEM_ID);
    put(&mut bytes, 16, &OEM_TABLE_ID);
    put(&mut bytes, 24, &OEM_REVISION.to_le_bytes());
    put(&mut bytes, 28, &CREATOR_ID);
    put(&mut bytes, 32, &CREATOR_REVISION.to_le_bytes());
    bytes[9] = checksum(&bytes);
    bytes
}
