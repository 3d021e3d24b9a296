//! The list of system calls as a filter of the kernel's (`seccomp(2)`).

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::calls::{Process, Rule, Test};

/// Puts the filter of `process` on this thread and what it starts.
pub(super) fn install(process: Process) -> Result<(), String> {
    let program = program(process).map_err(|e| e.to_string())?;
    seccompiler::apply_filter(&program).map_err(|e| e.to_string())
}

fn program(process: Process) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::new();
    for call in process.calls() {
        rules.insert(call.number, self::rules(call.rule)?);
    }
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// The alternatives of which one must hold; none: nothing is asked.
fn rules(rule: Rule) -> Result<Vec<SeccompRule>, BackendError> {
    let is = |argument, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    match rule {
        Rule::Any => Ok(Vec::new()),
        Rule::OneOf(argument, values) => {
            values.iter().map(|value| SeccompRule::new(vec![is(argument, *value)?])).collect()
        }
        Rule::AnyOf(lists) => {
            let mut rules = Vec::new();
            for tests in lists {
                for conditions in combinations(tests)? {
                    rules.push(SeccompRule::new(conditions)?);
                }
            }
            Ok(rules)
        }
        Rule::Without(argument, bits) => {
            let none = SeccompCmpOp::MaskedEq(bits);
            let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Qword, none, 0)?;
            Ok(vec![SeccompRule::new(vec![condition])?])
        }
        Rule::OwnProcess(argument) => {
            Ok(vec![SeccompRule::new(vec![is(argument, u64::from(std::process::id()))?])?])
        }
    }
}

/// Every choice of one value for each test.
fn combinations(tests: &[Test]) -> Result<Vec<Vec<SeccompCondition>>, BackendError> {
    let mut all = vec![Vec::new()];
    for Test { argument, mask, values } in tests {
        let mut longer = Vec::new();
        for (chosen, value) in all.iter().flat_map(|chosen| values.iter().map(move |value| (chosen, value))) {
            let mut chosen: Vec<SeccompCondition> = Vec::clone(chosen);
            let is = SeccompCmpOp::MaskedEq(*mask);
            chosen.push(SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, is, *value)?);
            longer.push(chosen);
        }
        all = longer;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_become_filters_that_the_kernel_takes() {
        // The kernel's limit, BPF_MAXINSNS.
        let program = program(Process::NetworkHelper).unwrap();
        assert!((50..4096).contains(&program.len()), "{} instructions", program.len());
    }
}
