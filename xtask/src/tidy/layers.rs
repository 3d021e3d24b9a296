//! A lower layer never names a higher one.
//!
//! The table below is the house: each crate, its folder, and the crates it may name. Both the manifests (every
//! kind of dependency) and the sources (`atoll_...` in code) are held against it. A crate that is not in the
//! table is a violation too: a new one must be given its place.

use super::lexer;
use super::{Tree, Violation};

/// A crate's place.
struct Place {
    name: &'static str,
    folder: &'static str,
    /// Every crate with a lower number may be named.
    layer: u8,
    /// Crates of the same layer that may be named as well.
    beside: &'static [&'static str],
}

const fn place(
    name: &'static str,
    folder: &'static str,
    layer: u8,
    beside: &'static [&'static str],
) -> Place {
    Place { name, folder, layer, beside }
}

/// The house, from the ground up.
const HOUSE: &[Place] = &[
    place("atoll-foundation", "foundation", 0, &[]),
    place("atoll-guests", "testing/guests", 0, &[]),
    place("atoll-api-types", "api_types", 1, &[]),
    place("atoll-machine", "machine", 1, &[]),
    place("atoll-backend-conformance", "backends/conformance", 2, &[]),
    place("atoll-storage", "storage", 2, &[]),
    place("atoll-network", "network", 2, &[]),
    place("atoll-network-user", "network/user", 2, &["atoll-network"]),
    // Siblings never see each other; the conformance suite is what each of them runs in its tests.
    place("atoll-cpu-software", "backends/software", 2, &["atoll-backend-conformance"]),
    place("atoll-kvm", "backends/kvm", 2, &["atoll-backend-conformance"]),
    place("atoll-differential", "testing/differential", 3, &[]),
    place("atoll-exit-hammer", "testing/exit-hammer", 3, &[]),
    place("atoll-oracle", "testing/oracle", 3, &[]),
    place("atoll-pci", "devices/pci", 3, &[]),
    place("atoll-chipset", "devices/chipset", 3, &["atoll-pci"]),
    place("atoll-virtio", "devices/virtio", 3, &["atoll-pci"]),
    place("atoll-firmware", "firmware", 4, &[]),
    place("atoll-vmm", "vmm", 5, &[]),
    // Its library names no crate of the workspace; its tests build whole machines.
    place("atoll-scenarios", "testing/scenarios", 6, &[]),
    place("atoll", "bin/atoll", 7, &[]),
    place("xtask", "xtask", 7, &[]),
];

/// Pairs that must stay apart although their layers would allow it.
const APART: [(&str, &str); 9] = [
    ("atoll-storage", "atoll-guests"),
    ("atoll-machine", "atoll-guests"),
    ("atoll-api-types", "atoll-guests"),
    // Devices reach instructions only through the traits of machine.
    ("atoll-pci", "atoll-cpu-software"),
    ("atoll-chipset", "atoll-cpu-software"),
    ("atoll-virtio", "atoll-cpu-software"),
    ("atoll-pci", "atoll-kvm"),
    ("atoll-chipset", "atoll-kvm"),
    ("atoll-virtio", "atoll-kvm"),
];

pub(super) fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, text) in &tree.files {
        let Some(folder) = path.strip_suffix("/Cargo.toml") else { continue };
        if folder != "fuzz" {
            violations.extend(check_manifest(path, folder, text));
        }
    }
    for (path, text) in tree.sources() {
        // A crate may lie within another's folder: the innermost counts.
        let within = |p: &&Place| path.strip_prefix(p.folder).is_some_and(|r| r.starts_with('/'));
        let Some(from) = HOUSE.iter().filter(within).max_by_key(|p| p.folder.len()) else {
            continue;
        };
        for (index, line) in lexer::lines(text).iter().enumerate() {
            for name in named_crates(&line.code) {
                if let Some(message) = forbidden(from, &name) {
                    violations.push(Violation::new(path, index + 1, message));
                }
            }
        }
    }
    violations
}

fn check_manifest(path: &str, folder: &str, text: &str) -> Vec<Violation> {
    let manifest: toml::Table = match toml::from_str(text) {
        Ok(manifest) => manifest,
        Err(error) => return vec![Violation::new(path, 0, format!("is no manifest: {error}"))],
    };
    let name =
        manifest.get("package").and_then(|p| p.get("name")).and_then(toml::Value::as_str).unwrap_or_default();
    let Some(from) = HOUSE.iter().find(|p| p.name == name && p.folder == folder) else {
        return vec![Violation::new(
            path,
            0,
            format!("crate `{name}` has no place in the layer table of tidy"),
        )];
    };
    let mut tables: Vec<&toml::Table> = vec![&manifest];
    if let Some(targets) = manifest.get("target").and_then(toml::Value::as_table) {
        tables.extend(targets.values().filter_map(toml::Value::as_table));
    }
    let mut violations = Vec::new();
    for table in tables {
        for kind in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = table.get(kind).and_then(toml::Value::as_table) else { continue };
            for (key, value) in dependencies {
                // A dependency may be renamed: the package's own name counts.
                let package = value.get("package").and_then(toml::Value::as_str).unwrap_or(key);
                if let Some(message) = forbidden(from, package) {
                    violations.push(Violation::new(path, 0, format!("{kind}: {message}")));
                }
            }
        }
    }
    violations
}

/// Why `from` may not name `package`; `None` if it may, or if the package is not one of the house.
fn forbidden(from: &Place, package: &str) -> Option<String> {
    let to = HOUSE.iter().find(|p| p.name == package)?;
    let apart = APART.contains(&(from.name, to.name));
    let allowed = to.layer < from.layer || from.beside.contains(&to.name) || to.name == from.name;
    (!allowed || apart).then(|| format!("`{}` may not name `{}`: layers only look down", from.name, to.name))
}

/// Package names behind the `atoll_...` names in a line of code.
fn named_crates(code: &str) -> Vec<String> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("atoll_"))
        .map(|word| word.replace('_', "-"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(files: &[(&str, &str)]) -> Vec<String> {
        check(&Tree::of(files)).into_iter().map(|v| format!("{}:{}: {}", v.path, v.line, v.message)).collect()
    }

    #[test]
    fn a_manifest_that_looks_up_is_caught_in_every_dependency_table() {
        for table in ["dependencies", "dev-dependencies", "target.'cfg(unix)'.dependencies"] {
            let text =
                format!("[package]\nname = \"atoll-machine\"\n[{table}]\natoll-vmm.workspace = true\n");
            let found = messages(&[("machine/Cargo.toml", &text)]);
            assert_eq!(found.len(), 1, "{table}: {found:?}");
            assert!(found[0].contains("`atoll-machine` may not name `atoll-vmm`"));
        }
    }

    #[test]
    fn a_renamed_dependency_is_caught() {
        let text = "[package]\nname = \"atoll-machine\"\n[dependencies]\nx = { package = \"atoll-pci\", path = \"p\" }\n";
        assert_eq!(messages(&[("machine/Cargo.toml", text)]).len(), 1);
    }

    #[test]
    fn a_source_that_names_a_higher_layer_is_caught_and_prose_is_not() {
        let text = "// atoll_vmm is above us\nlet s = \"atoll_vmm\";\nuse atoll_vmm::Machine;\n";
        let found = messages(&[("machine/src/lib.rs", text)]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("machine/src/lib.rs:3:"));
    }

    #[test]
    fn a_crate_within_a_crates_folder_has_its_own_place() {
        let text = "use atoll_network_user::UserNet;";
        assert_eq!(messages(&[("network/user/tests/process.rs", text)]).len(), 0);
        assert_eq!(messages(&[("network/tests/process.rs", text)]).len(), 1);
    }

    #[test]
    fn siblings_are_apart_unless_the_table_says_otherwise() {
        assert_eq!(messages(&[("storage/src/lib.rs", "use atoll_cpu_software::X;")]).len(), 1);
        assert_eq!(messages(&[("devices/pci/src/lib.rs", "use atoll_virtio::X;")]).len(), 1);
        assert!(messages(&[("devices/virtio/src/lib.rs", "use atoll_pci::X;")]).is_empty());
    }

    #[test]
    fn devices_do_not_name_a_processor() {
        assert_eq!(messages(&[("devices/virtio/src/lib.rs", "use atoll_cpu_software::X;")]).len(), 1);
    }

    #[test]
    fn looking_down_is_allowed() {
        assert!(messages(&[("vmm/src/lib.rs", "use atoll_machine::X; use atoll_virtio::Y;")]).is_empty());
    }

    #[test]
    fn a_crate_without_a_place_is_caught() {
        let found = messages(&[("web/Cargo.toml", "[package]\nname = \"atoll-web\"\n")]);
        assert!(found[0].contains("no place in the layer table"), "{found:?}");
    }

    #[test]
    fn every_place_is_a_member_of_the_workspace() {
        let manifest = std::fs::read_to_string(crate::process::root().join("Cargo.toml")).unwrap();
        for place in HOUSE {
            assert!(manifest.contains(&format!("\"{}\"", place.folder)), "{} is no member", place.folder);
        }
    }
}
