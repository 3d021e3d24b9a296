//! The ACPI tables against ACPICA's compiler: each table is disassembled, and what comes out compiles again
//! without an error or a warning to the same table.

use atoll_firmware::acpi::{self, AcpiConfig, AcpiImage, CpuEntry, FixedDevices, RootPort};
use atoll_firmware::layout::{AddressMap, GIB};
use std::path::Path;
use std::process::Command;

/// Runs `iasl` in `directory`; its output, and whether it ended well.
fn iasl(directory: &Path, arguments: &[&str]) -> (String, bool) {
    let output = Command::new("iasl").current_dir(directory).args(arguments).output().expect("iasl starts");
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}

/// Whether iasl is installed. Prints why the test does nothing if not.
fn iasl_is_installed(test: &str) -> bool {
    let found = Command::new("iasl").arg("-v").output().is_ok();
    if !found {
        println!("skipped {test}: iasl is not installed (Debian package acpica-tools)");
    }
    found
}

/// A machine with everything that tables can say.
fn full_machine() -> AcpiImage {
    let map = AddressMap::new(6 * GIB, 64 * GIB).unwrap();
    // ACPICA before 2022 does not know the online-capable flag of x2APIC structures: those are all present here.
    let present = |apic_id: u32| apic_id % 3 != 1 || apic_id >= 255;
    let cpus: Vec<CpuEntry> =
        (0..300).map(|apic_id| CpuEntry { apic_id, present: present(apic_id) }).collect();
    let root_ports: Vec<RootPort> = (0..16)
        .map(|slot| RootPort { device: 2 + slot / 8, function: slot % 8, slot: slot.into() })
        .collect();
    let devices = FixedDevices { com1: true, i8042: true, pvpanic: true, vga: true };
    acpi::build(&AcpiConfig { map: &map, cpus: &cpus, root_ports: &root_ports, devices }).unwrap()
}

/// The smallest machine.
fn small_machine() -> AcpiImage {
    let map = AddressMap::new(16 << 20, 16 << 20).unwrap();
    let cpus = [CpuEntry { apic_id: 0, present: true }];
    let devices = FixedDevices { com1: false, i8042: false, pvpanic: false, vga: false };
    acpi::build(&AcpiConfig { map: &map, cpus: &cpus, root_ports: &[], devices }).unwrap()
}

/// Disassembles and recompiles one table and says what came out.
fn round_trip(directory: &Path, signature: &[u8; 4], bytes: &[u8]) {
    let name = std::str::from_utf8(signature).unwrap().to_lowercase();
    let (binary, source) = (format!("{name}.dat"), format!("{name}.dsl"));
    std::fs::write(directory.join(&binary), bytes).unwrap();
    let (text, good) = iasl(directory, &["-d", &binary]);
    let complaints = ["Error", "Warning", "Invalid", "unknown", "Unknown", "past end", "Incorrect"];
    let clean = |text: &str| !complaints.iter().any(|word| text.contains(word));
    assert!(good && clean(&text), "disassembling {name}:\n{text}");
    let listing = std::fs::read_to_string(directory.join(&source)).unwrap();
    assert!(clean(&listing), "disassembly of {name}:\n{listing}");

    let (text, good) = iasl(directory, &["-vs", "-p", &format!("{name}_new"), &source]);
    assert!(good && text.contains("0 Errors, 0 Warnings"), "compiling {name}:\n{text}");
    let mut again = std::fs::read(directory.join(format!("{name}_new.aml"))).unwrap();
    assert_eq!(again.len(), bytes.len(), "{name} changed its length");
    if signature != b"FACS" {
        // The compiler signs what it makes: checksum, compiler name and version differ.
        again[9] = bytes[9];
        again[28..36].copy_from_slice(&bytes[28..36]);
    }
    let difference = (0..bytes.len()).find(|at| bytes[*at] != again[*at]);
    assert_eq!(difference, None, "{name} does not survive, offset of the first difference");
}

fn check(test: &str, image: &AcpiImage) {
    if !iasl_is_installed(test) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for table in image.tables.iter().filter(|table| &table.signature != b"RSD ") {
        round_trip(directory.path(), &table.signature, &table.bytes);
    }
}

#[test]
fn tables_of_a_full_machine_compile_again_to_the_same_tables() {
    check("tables_of_a_full_machine_compile_again_to_the_same_tables", &full_machine());
}

#[test]
fn tables_of_the_smallest_machine_compile_again_to_the_same_tables() {
    check("tables_of_the_smallest_machine_compile_again_to_the_same_tables", &small_machine());
}
