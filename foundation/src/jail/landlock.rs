//! Landlock: a process takes rights over files from itself, without any privilege.

use landlock::{ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope};

/// Refuses every access to files, signals to processes outside and abstract sockets made outside, as far as this
/// kernel's Landlock knows them.
pub(super) fn refuse_everything() -> Result<(), String> {
    let restrict = || -> Result<RulesetStatus, RulesetError> {
        let rules =
            Ruleset::default().handle_access(AccessFs::from_all(ABI::V6))?.scope(Scope::from_all(ABI::V6))?;
        Ok(rules.create()?.restrict_self()?.ruleset)
    };
    match restrict() {
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => Ok(()),
        Ok(RulesetStatus::NotEnforced) => Err("the kernel does not have it".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}
