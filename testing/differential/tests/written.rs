//! The written cases against their expectations, and against the reference emulator if it is installed.

use atoll_differential::{Family, Width, deviations, on_atoll, on_qemu, record, run, written};

const EXPECTED: [(Width, &str); 3] = [
    (Width::Real, include_str!("../expected/real.txt")),
    (Width::Protected, include_str!("../expected/protected.txt")),
    (Width::Long, include_str!("../expected/long.txt")),
];

#[test]
fn written_cases_end_as_expected() {
    for (width, expected) in EXPECTED {
        let suite = written(width).expect("cases");
        let lines = run::lines(&suite, on_atoll::run).expect("run");
        let expected: Vec<&str> = expected.lines().collect();
        let differing: Vec<String> = lines
            .iter()
            .zip(&expected)
            .map(|(is, should)| (is.as_deref().unwrap_or("crashed or hung"), *should))
            .filter(|(is, should)| is != should)
            .map(|(is, should)| format!("is:        {is}\nshould be: {should}"))
            .collect();
        assert!(differing.is_empty(), "{}: {}", width.name(), differing.join("\n"));
        assert_eq!(lines.len(), expected.len(), "{}", width.name());
    }
}

#[test]
fn seeded_cases_all_end_in_an_exception() {
    for family in Family::ALL {
        let suite = family.suite(7, 0..300).expect("cases");
        let lines = run::lines(&suite, on_atoll::run).expect("run");
        let lost = lines.iter().position(Option::is_none);
        assert_eq!(lost.and_then(|index| suite.names().nth(index)), None, "crashed or hung");
    }
}

#[test]
fn the_reference_emulator_agrees_apart_from_its_known_deviations() {
    if !on_qemu::installed() {
        println!("skipped: the_reference_emulator_agrees: qemu-system-x86_64 is not installed");
        return;
    }
    for (width, expected) in EXPECTED {
        let suite = written(width).expect("cases");
        let lines = run::lines(&suite, on_qemu::run).expect("run");
        assert_eq!(lines.len(), expected.lines().count(), "{}", width.name());
        for (name, (is, should)) in suite.names().zip(lines.iter().zip(expected.lines())) {
            let is = is.as_deref();
            if deviations::explaining(name, Some(should), is).is_none() {
                assert_eq!(is.map(record::without_rf), Some(record::without_rf(should)));
            }
        }
    }
    // Few, because a whole run is the program's.
    for family in Family::ALL {
        let differences = run::compare(&family.suite(7, 0..300).expect("cases")).expect("run");
        for difference in differences.into_iter().filter(|d| !d.known) {
            assert_eq!(difference.ours, difference.theirs);
        }
    }
}
