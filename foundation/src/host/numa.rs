//! The host's processors and memory nodes, by number.

use std::fs;
use std::path::Path;

/// A NUMA node with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumaNode {
    /// Its number.
    pub id: u32,
    /// Its memory, in bytes.
    pub total: u64,
    /// Its unused memory, in bytes.
    pub free: u64,
}

/// The nodes that are there and have memory, ascending; none where the kernel knows no nodes.
pub fn nodes() -> Vec<NumaNode> {
    nodes_in(Path::new("/sys/devices/system/node"))
}

fn nodes_in(folder: &Path) -> Vec<NumaNode> {
    let listed = fs::read_to_string(folder.join("has_memory")).unwrap_or_default();
    let node = |id| {
        let text = fs::read_to_string(folder.join(format!("node{id}/meminfo"))).ok()?;
        Some(NumaNode { id, total: field(&text, "MemTotal")?, free: field(&text, "MemFree")? })
    };
    parse_list(&listed).into_iter().filter_map(node).collect()
}

/// The value in bytes of a line `Node 0 Name:   123 kB`.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut words = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.rsplit(' ').next() == Some(name)).then(|| value.split_whitespace())
    })?;
    words.next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The host's processors that are switched on, ascending.
pub fn online_cpus() -> Vec<u32> {
    parse_list(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// Longest range of numbers that is believed: no host has more processors or nodes.
const MAX_RANGE: u32 = 65_536;

/// Numbers as the kernel lists them: `0-3,8`. What is no number is left out.
pub fn parse_list(text: &str) -> Vec<u32> {
    let ranges = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.parse::<u32>().ok()?, last.parse::<u32>().ok()?))
    });
    ranges.filter(|(a, b)| b.saturating_sub(*a) < MAX_RANGE).flat_map(|(a, b)| a..=b).collect()
}

/// Numbers as the kernel lists them, from ascending numbers; `none` for none.
pub fn show_list(numbers: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for &n in numbers {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(n) => *last = n,
            _ => ranges.push((n, n)),
        }
    }
    if ranges.is_empty() {
        return "none".to_owned();
    }
    let show = |(a, b): &(u32, u32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    ranges.iter().map(show).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        assert_eq!(parse_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list("\n"), [] as [u32; 0]);
        assert_eq!(parse_list("0-4294967295,x,5"), [5]);
        for text in ["0", "0-1", "0,2-4,63"] {
            assert_eq!(show_list(&parse_list(text)), text);
        }
        assert_eq!(show_list(&[]), "none");
    }

    #[test]
    fn nodes_without_memory_are_no_nodes() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("online"), "0-2\n").unwrap();
        fs::write(folder.path().join("has_memory"), "0,2\n").unwrap();
        for id in 0..3 {
            let node = folder.path().join(format!("node{id}"));
            fs::create_dir(&node).unwrap();
            let text = format!(
                "Node {id} MemTotal:       11102420 kB\nNode {id} MemFree:         8880252 kB\n\
                 Node {id} MemUsed:         2222168 kB\nNode {id} SwapCached:            0 kB\n"
            );
            fs::write(node.join("meminfo"), text).unwrap();
        }
        let (total, free) = (11_102_420 << 10, 8_880_252 << 10);
        assert_eq!(
            nodes_in(folder.path()),
            [NumaNode { id: 0, total, free }, NumaNode { id: 2, total, free }]
        );
        assert_eq!(nodes_in(&folder.path().join("absent")), []);
    }

    #[test]
    fn this_host_has_a_processor() {
        assert!(!online_cpus().is_empty());
        assert!(nodes().iter().all(|n| n.free <= n.total));
    }
}
