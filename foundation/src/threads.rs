//! Names and processor affinity of threads.

use std::ffi::CString;
use std::io;
use std::thread::JoinHandle;

use rustix::thread::CpuSet;

/// The kernel keeps this many bytes of a thread's name.
pub const MAX_NAME_LEN: usize = 15;

/// Highest host processor number plus one that an affinity can name.
pub const MAX_CPUS: usize = CpuSet::MAX_CPU;

/// Starts a thread whose name shows in `top -H` and panics; a name longer than [`MAX_NAME_LEN`] bytes is cut.
/// Fails when the host refuses another thread.
pub fn spawn<R: Send + 'static>(
    name: &str,
    body: impl FnOnce() -> R + Send + 'static,
) -> io::Result<JoinHandle<R>> {
    std::thread::Builder::new().name(cut_name(name).to_owned()).spawn(body)
}

/// Names the calling thread, as the host's tools show it; cut to [`MAX_NAME_LEN`] bytes.
pub fn set_current_name(name: &str) -> io::Result<()> {
    let name = CString::new(cut_name(name))?;
    Ok(rustix::thread::set_name(&name)?)
}

/// Lets the calling thread run on the given host processors only. `InvalidInput` when the list is empty, names
/// a processor from [`MAX_CPUS`] on, or none of them may be used by this process.
pub fn set_current_affinity(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        if *cpu >= MAX_CPUS {
            let text = format!("host processor {cpu} is beyond the limit of {MAX_CPUS}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        set.set(*cpu);
    }
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// The host processors the calling thread may run on, ascending.
pub fn current_affinity() -> io::Result<Vec<usize>> {
    let set = rustix::thread::sched_getaffinity(None)?;
    Ok((0..MAX_CPUS).filter(|cpu| set.is_set(*cpu)).collect())
}

/// The longest prefix of whole characters within the limit, up to a NUL byte.
fn cut_name(name: &str) -> &str {
    let name = name.split('\0').next().unwrap_or_default();
    let mut end = name.len().min(MAX_NAME_LEN);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        assert_eq!(cut_name("vcpu0"), "vcpu0");
        assert_eq!(cut_name("ééééééééé"), "ééééééé");
        assert_eq!(cut_name("a\0b"), "a");
    }

    #[test]
    fn a_spawned_thread_has_its_name() {
        let thread = spawn("a name that is rather long", || rustix::thread::name().unwrap()).unwrap();
        assert_eq!(thread.join().unwrap().to_str().unwrap(), "a name that is ");
    }

    #[test]
    fn affinity_is_set_and_read_back() {
        let thread = spawn("affinity", || {
            let allowed = current_affinity().unwrap();
            set_current_affinity(&allowed[..1]).unwrap();
            set_current_name("renamed").unwrap();
            (allowed[0], current_affinity().unwrap(), rustix::thread::name().unwrap())
        });
        let (first, now, name) = thread.unwrap().join().unwrap();
        assert_eq!(now, [first]);
        assert_eq!(name.to_str().unwrap(), "renamed");
    }

    #[test]
    fn an_impossible_affinity_is_refused() {
        assert!(set_current_affinity(&[]).is_err());
        assert!(set_current_affinity(&[MAX_CPUS]).is_err());
    }
}
