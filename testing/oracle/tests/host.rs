//! The interpreter agrees with this processor: a fixed set of cases, a random one, and the corpus.

use std::process::Command;

fn oracle(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_atoll-oracle")).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.success(), text + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn the_interpreter_agrees_with_the_host_on_a_fixed_seed() {
    let (agrees, text) = oracle(&["--seed", "0x61746f6c6c", "--cases", "200000", "--jobs", "2"]);
    println!("{text}");
    assert!(agrees, "{text}");
}

#[test]
fn the_interpreter_agrees_with_the_host_on_a_random_seed() {
    // The seed is on the first line of what it prints.
    let (agrees, text) = oracle(&["--cases", "100000", "--jobs", "2"]);
    println!("{text}");
    assert!(agrees, "{text}");
}

#[test]
fn known_cases_stay_fixed() {
    let (agrees, text) = oracle(&["--corpus", "100"]);
    assert!(agrees, "{text}");
}
