//! The written cases against their expectations, and against the reference emulator if it is installed.

use atoll_differential::{Width, deviations, kernel, on_atoll, on_qemu, record, seeded, written};

const EXPECTED: [(Width, &str); 2] = [
    (Width::Protected, include_str!("../expected/protected.txt")),
    (Width::Long, include_str!("../expected/long.txt")),
];

#[test]
fn written_cases_end_as_expected() {
    for (width, expected) in EXPECTED {
        let suite = written(width).expect("cases");
        let lines = record::lines(&suite, &on_atoll::run(&kernel(&suite).expect("kernel")).expect("run"));
        let expected: Vec<&str> = expected.lines().collect();
        let differing: Vec<String> = lines
            .iter()
            .zip(&expected)
            .filter(|(is, should)| is != *should)
            .map(|(is, should)| format!("is:        {is}\nshould be: {should}"))
            .collect();
        assert!(differing.is_empty(), "{}: {}", width.name(), differing.join("\n"));
        assert_eq!(lines.len(), expected.len(), "{}", width.name());
        assert_eq!(lines.len(), suite.names().count(), "{}: the kernel stopped early", width.name());
    }
}

#[test]
fn seeded_cases_all_end_in_an_exception() {
    for width in [Width::Protected, Width::Long] {
        let suite = seeded(width, 7, 500).expect("cases");
        let lines = record::lines(&suite, &on_atoll::run(&kernel(&suite).expect("kernel")).expect("run"));
        assert_eq!(lines.len(), 500, "{}: stopped after {:?}", width.name(), lines.last());
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
        let lines = record::lines(&suite, &on_qemu::run(&kernel(&suite).expect("kernel")).expect("run"));
        for (name, (is, should)) in suite.names().zip(lines.iter().zip(expected.lines())) {
            if deviations::of(name).is_none() {
                assert_eq!(record::without_rf(is), record::without_rf(should));
            }
        }
        assert_eq!(lines.len(), expected.lines().count(), "{}", width.name());
    }
}
