//! The host side: runs a case on the processor this program runs on.
//!
//! ```text
//! run ── enter (assembly): vector state, segments, flags, registers ──► code of the case
//!  ▲                                                                        │ INT3 after it, or a fault
//!  └── leave (assembly): the host's segments and stack again ◄── signal ────┘ the kernel saved everything
//! ```
//!
//! The signal handler never returns to the kernel: it goes back to `run`'s caller with the handler's frame
//! still on the alternate stack, from which the state after is read. FS base, which the case may change, is the
//! Rust runtime's thread pointer, so the handler's first acts are in assembly too.
//!
//! One case at a time per process: see [`Native::new`].

// UNSAFETY: runs arbitrary user-mode instructions in this process, maps fixed addresses, handles signals.
#![allow(unsafe_code)]

use std::io;
use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::case::{After, Case, Mode, Patterns, Trap, XSAVE};
use crate::layout::{self, BASE, CODE, CODE_LEN, PAGE, WINDOW};

/// What the assembly reads and writes.
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    rflags: u64,
    fs_base: u64,
    gs_base: u64,
    rip: u64,
    far_offset: u32,
    far_selector: u16,
    in_case: u16,
    ds: u16,
    es: u16,
    fs: u16,
    gs: u16,
    ss: u16,
    is_long: u16,
    pad: u32,
    host_rsp: u64,
    host_fs: u64,
    frame: *mut libc::ucontext_t,
    area: *const u8,
    out_ds: u16,
    out_es: u16,
    out_fs: u16,
    out_gs: u16,
    out_fs_base: u64,
    out_gs_base: u64,
    /// Handlers that signals outside cases go to, by signal number.
    previous: [u64; 32],
}

static mut CONTEXT: Context = Context {
    gpr: [0; 16],
    rflags: 0,
    fs_base: 0,
    gs_base: 0,
    rip: 0,
    far_offset: 0,
    far_selector: 0,
    in_case: 0,
    ds: 0,
    es: 0,
    fs: 0,
    gs: 0,
    ss: 0,
    is_long: 0,
    pad: 0,
    host_rsp: 0,
    host_fs: 0,
    frame: ptr::null_mut(),
    area: ptr::null(),
    out_ds: 0,
    out_es: 0,
    out_fs: 0,
    out_gs: 0,
    out_fs_base: 0,
    out_gs_base: 0,
    previous: [0; 32],
};

unsafe extern "sysv64" {
    fn atoll_oracle_enter();
    fn atoll_oracle_handler();
}

std::arch::global_asm!(
    ".pushsection .text",
    ".balign 64",
    ".globl atoll_oracle_enter",
    ".hidden atoll_oracle_enter",
    "atoll_oracle_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    // The code was written through another mapping: serialise (Intel SDM vol. 3, 9.1.3).
    "mov rax, rsp",
    "mov ecx, ss",
    "push rcx",
    "push rax",
    "pushfq",
    "mov ecx, cs",
    "push rcx",
    "lea rcx, [rip + 2f]",
    "push rcx",
    "iretq",
    "2:",
    "mov [rip + {ctx} + {host_rsp}], rsp",
    "rdfsbase rax",
    "mov [rip + {ctx} + {host_fs}], rax",
    "mov rdi, [rip + {ctx} + {area}]",
    "mov eax, -1",
    "mov edx, -1",
    "xrstor64 [rdi]",
    "mov eax, [rip + {ctx} + {ds}]",
    "mov ds, eax",
    "mov eax, [rip + {ctx} + {es}]",
    "mov es, eax",
    "movzx eax, word ptr [rip + {ctx} + {fs}]",
    "mov fs, eax",
    "movzx eax, word ptr [rip + {ctx} + {gs}]",
    "mov gs, eax",
    "mov word ptr [rip + {ctx} + {in_case}], 1",
    "cmp word ptr [rip + {ctx} + {is_long}], 0",
    "je 3f",
    "mov rax, [rip + {ctx} + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rip + {ctx} + {gs_base}]",
    "wrgsbase rax",
    "3:",
    "movzx eax, word ptr [rip + {ctx} + {ss}]",
    "mov ss, eax",
    "push qword ptr [rip + {ctx} + {rflags}]",
    "popfq",
    "mov rax, [rip + {ctx} + 0]",
    "mov rcx, [rip + {ctx} + 8]",
    "mov rdx, [rip + {ctx} + 16]",
    "mov rbx, [rip + {ctx} + 24]",
    "mov rsp, [rip + {ctx} + 32]",
    "mov rbp, [rip + {ctx} + 40]",
    "mov rsi, [rip + {ctx} + 48]",
    "mov rdi, [rip + {ctx} + 56]",
    "mov r8, [rip + {ctx} + 64]",
    "mov r9, [rip + {ctx} + 72]",
    "mov r10, [rip + {ctx} + 80]",
    "mov r11, [rip + {ctx} + 88]",
    "mov r12, [rip + {ctx} + 96]",
    "mov r13, [rip + {ctx} + 104]",
    "mov r14, [rip + {ctx} + 112]",
    "mov r15, [rip + {ctx} + 120]",
    // JMP FAR m16:32, which every vendor has in 64-bit mode.
    ".byte 0xff, 0x2d",
    ".long {ctx} + {far_offset} - . - 4",
    ".balign 64",
    ".globl atoll_oracle_handler",
    ".hidden atoll_oracle_handler",
    "atoll_oracle_handler:",
    "cmp word ptr [rip + {ctx} + {in_case}], 0",
    "jne 4f",
    "lea rax, [rip + {ctx} + {previous}]",
    "mov ecx, edi",
    "jmp [rax + rcx * 8]",
    "4:",
    "mov [rip + {ctx} + {frame}], rdx",
    "mov [rip + {ctx} + {out_ds}], ds",
    "mov [rip + {ctx} + {out_es}], es",
    "mov [rip + {ctx} + {out_fs}], fs",
    "mov [rip + {ctx} + {out_gs}], gs",
    "rdfsbase rax",
    "mov [rip + {ctx} + {out_fs_base}], rax",
    "rdgsbase rax",
    "mov [rip + {ctx} + {out_gs_base}], rax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov eax, 0x2b",
    "mov ss, eax",
    "mov rax, [rip + {ctx} + {host_fs}]",
    "wrfsbase rax",
    "mov word ptr [rip + {ctx} + {in_case}], 0",
    "mov rsp, [rip + {ctx} + {host_rsp}]",
    "push 2",
    "popfq",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ".popsection",
    ctx = sym CONTEXT,
    rflags = const offset_of!(Context, rflags),
    fs_base = const offset_of!(Context, fs_base),
    gs_base = const offset_of!(Context, gs_base),
    far_offset = const offset_of!(Context, far_offset),
    in_case = const offset_of!(Context, in_case),
    ds = const offset_of!(Context, ds),
    es = const offset_of!(Context, es),
    fs = const offset_of!(Context, fs),
    gs = const offset_of!(Context, gs),
    ss = const offset_of!(Context, ss),
    is_long = const offset_of!(Context, is_long),
    host_rsp = const offset_of!(Context, host_rsp),
    host_fs = const offset_of!(Context, host_fs),
    frame = const offset_of!(Context, frame),
    area = const offset_of!(Context, area),
    out_ds = const offset_of!(Context, out_ds),
    out_es = const offset_of!(Context, out_es),
    out_fs = const offset_of!(Context, out_fs),
    out_gs = const offset_of!(Context, out_gs),
    out_fs_base = const offset_of!(Context, out_fs_base),
    out_gs_base = const offset_of!(Context, out_gs_base),
    previous = const offset_of!(Context, previous),
);

/// Signals in which a case may end.
const SIGNALS: [libc::c_int; 5] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];
/// Bytes of the alternate signal stack: many times what the kernel's largest frame takes.
const SIGNAL_STACK: usize = 64 << 10;
/// Bytes of the vector state that is loaded before a case; beyond [`XSAVE`] all components are in their
/// initial configuration, so only the header says anything about them.
const AREA: usize = 16 << 10;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The window in this process and its writable alias.
pub struct Native {
    /// The writable view of the whole window.
    alias: *mut u8,
    area: *mut u8,
    code_used: (usize, usize),
}

fn failed(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

extern "C" fn unexpected(signal: libc::c_int) {
    // SAFETY: restores the default action; the instruction faults again and ends the process visibly.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

impl Native {
    /// Maps the window, makes the local descriptor table and takes over the fault signals of the process: at
    /// most one value exists per process. Handlers installed earlier still get the signals raised outside
    /// cases; none may be installed for those signals later.
    pub fn new(patterns: &Patterns) -> io::Result<Self> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(io::Error::other("the host side of the oracle exists once per process"));
        }
        install_segments()?;
        let alias = map_window()?;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let area = unsafe { map_anonymous(AREA + SIGNAL_STACK)? };
        // SAFETY: the stack is the second part of the mapping just made, which is never unmapped.
        unsafe { install_handlers(area.add(AREA))? };
        let native = Self { alias, area, code_used: (0, CODE_LEN) };
        // SAFETY: XSAVE areas and pages lie inside the mappings made above.
        unsafe {
            (&raw mut CONTEXT.area).write(area);
            ptr::write_bytes(alias.add(CODE), 0xcc, CODE_LEN);
        }
        native.page_mut(layout::READ_ONLY).copy_from_slice(patterns.read_only());
        Ok(native)
    }

    /// One page of the window, as it is now.
    pub fn page(&self, offset: usize) -> &[u8; PAGE] {
        assert!(offset.is_multiple_of(PAGE) && offset < WINDOW);
        // SAFETY: inside the alias of the window, which lives as long as the process; cases only run in
        // `run`, which borrows `self` exclusively.
        unsafe { &*self.alias.add(offset).cast() }
    }

    /// One page of the window, to be prepared.
    #[allow(clippy::mut_from_ref)]
    fn page_mut(&self, offset: usize) -> &mut [u8; PAGE] {
        assert!(offset.is_multiple_of(PAGE) && offset < WINDOW);
        // SAFETY: as in `page`; private, and no caller keeps two of them.
        unsafe { &mut *self.alias.add(offset).cast() }
    }

    /// A writable page of the window.
    pub fn writable(&mut self, offset: usize) -> &mut [u8; PAGE] {
        self.page_mut(offset)
    }

    /// Puts INT3 all over the code pages but for the case's code.
    fn place_code(&mut self, case: &Case) {
        let at = case.at.clamp(CODE, CODE + CODE_LEN);
        let len = case.code.len().min(CODE + CODE_LEN - at);
        let (from, used) = self.code_used;
        // SAFETY: both ranges lie inside the code pages of the alias.
        unsafe {
            ptr::write_bytes(self.alias.add(CODE + from), 0xcc, used);
            ptr::copy_nonoverlapping(case.code.as_ptr(), self.alias.add(at), len);
        }
        self.code_used = (at - CODE, len);
    }

    /// Runs a case whose memory is already in place.
    pub fn run(&mut self, case: &Case, after: &mut After) {
        self.place_code(case);
        // SAFETY: CONTEXT is only used by this type, of which one value exists, and by the assembly that runs
        // inside this function. The area has room for the state. The code of a case is confined by the
        // generator: it does not enter the kernel, and what it changes (registers, segments, FS base, stack) is
        // put back by the handler that ends it.
        unsafe {
            let context = &raw mut CONTEXT;
            ptr::copy_nonoverlapping(case.vectors.0.as_ptr(), self.area, XSAVE);
            (*context).gpr = case.gpr;
            (*context).rflags = case.rflags;
            (*context).fs_base = case.fs_base;
            (*context).gs_base = case.gs_base;
            (*context).far_offset = case.start() as u32;
            let [es, cs, ss, ds, fs, gs] = case.selectors;
            (*context).far_selector = cs;
            (*context).ds = ds;
            (*context).es = es;
            (*context).ss = ss;
            (*context).fs = fs;
            (*context).gs = gs;
            (*context).is_long = u16::from(case.mode == Mode::Long);
            atoll_oracle_enter();
            collect(&*context, after);
        }
    }
}

/// Reads the state that the kernel saved.
fn collect(context: &Context, after: &mut After) {
    // SAFETY: the handler stored the frame's address; the frame stays until the next signal.
    let frame = unsafe { &*context.frame };
    let registers = &frame.uc_mcontext.gregs;
    let get = |index: libc::c_int| registers[index as usize] as u64;
    const ORDER: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    after.gpr = ORDER.map(get);
    after.rip = get(libc::REG_RIP);
    after.rflags = get(libc::REG_EFL);
    let vector = get(libc::REG_TRAPNO);
    let address = if vector == 14 { get(libc::REG_CR2) } else { 0 };
    after.trap = Trap { vector, error_code: get(libc::REG_ERR), address };
    // CS, GS, FS and SS, 16 bits each; FS and GS are not filled in.
    let selectors = get(libc::REG_CSGSFS);
    let (cs, ss) = (selectors as u16, (selectors >> 48) as u16);
    after.selectors = [context.out_es, cs, ss, context.out_ds, context.out_fs, context.out_gs];
    after.fs_base = context.out_fs_base;
    after.gs_base = context.out_gs_base;
    // SAFETY: with XSAVE the kernel's frame holds the standard layout, more than `XSAVE` bytes.
    unsafe {
        let saved = frame.uc_mcontext.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(saved, after.vectors.0.as_mut_ptr(), XSAVE);
    }
}

/// # Safety
/// None beyond that of a new mapping.
unsafe fn map_anonymous(len: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: the kernel chooses the address.
    let p = unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if p == libc::MAP_FAILED { Err(failed("mapping memory")) } else { Ok(p.cast()) }
}

/// Maps the window at its fixed address, page by page with its permissions, and once more writable.
fn map_window() -> io::Result<*mut u8> {
    const R: i32 = libc::PROT_READ;
    const W: i32 = libc::PROT_WRITE;
    let parts: [(usize, usize, i32); 5] = [
        (CODE, CODE_LEN, R | libc::PROT_EXEC),
        (layout::DATA, layout::DATA_LEN, R | W),
        (layout::READ_ONLY, PAGE, R),
        (layout::STACK, PAGE, R | W),
        (layout::TOP, PAGE, R | W),
    ];
    // SAFETY: system calls on a descriptor made here; fixed mappings replace nothing (NOREPLACE) except the
    // reservation that this function made itself.
    unsafe {
        let mut fd =
            libc::memfd_create(c"atoll-oracle".as_ptr(), libc::MFD_CLOEXEC | 0x10 /* MFD_EXEC */);
        if fd < 0 {
            fd = libc::memfd_create(c"atoll-oracle".as_ptr(), libc::MFD_CLOEXEC);
        }
        if fd < 0 || libc::ftruncate(fd, WINDOW as i64) != 0 {
            return Err(failed("memory for the window"));
        }
        let shared = libc::MAP_SHARED | libc::MAP_POPULATE;
        let alias = libc::mmap(ptr::null_mut(), WINDOW, R | W, shared, fd, 0);
        if alias == libc::MAP_FAILED {
            return Err(failed("mapping the window's alias"));
        }
        let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = BASE as usize as *mut libc::c_void;
        if libc::mmap(at, WINDOW, libc::PROT_NONE, reserve, -1, 0) != at {
            return Err(failed("reserving the window at 0x10000000"));
        }
        for (offset, len, protection) in parts {
            let at = (BASE as usize + offset) as *mut libc::c_void;
            let part = libc::mmap(at, len, protection, shared | libc::MAP_FIXED, fd, offset as libc::off_t);
            if part != at {
                return Err(failed("mapping the window"));
            }
        }
        libc::close(fd);
        Ok(alias.cast())
    }
}

/// `struct user_desc` of modify_ldt(2).
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

fn install_segments() -> io::Result<()> {
    for (entry, local) in layout::LOCAL.iter().enumerate() {
        let bit = |condition: bool, at: u32| u32::from(condition) << at;
        let mut descriptor = UserDesc {
            entry: entry as u32,
            base: local.base,
            limit: local.limit,
            flags: bit(local.big, 0)
                | u32::from(local.contents) << 1
                | bit(local.restricted, 3)
                | bit(local.pages, 4)
                | bit(!local.present, 5)
                | 1 << 6,
        };
        // SAFETY: modify_ldt(0x11) reads one structure of the size given.
        let result =
            unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw mut descriptor, size_of::<UserDesc>()) };
        // The kernel returns an int, so errors arrive as large positive numbers.
        if result as i32 != 0 {
            return Err(io::Error::other(format!("modify_ldt: {result}; 16-bit cases need it")));
        }
    }
    Ok(())
}

/// # Safety
/// `stack` is the start of `SIGNAL_STACK` bytes that stay mapped.
unsafe fn install_handlers(stack: *mut u8) -> io::Result<()> {
    let stack = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
    // SAFETY: see above; the handler has the signature of SA_SIGINFO handlers, touches no stack of the case and
    // sends signals outside cases to the handler that was there before.
    unsafe {
        if libc::sigaltstack(&raw const stack, ptr::null_mut()) != 0 {
            return Err(failed("sigaltstack"));
        }
        for signal in SIGNALS {
            let mut action: libc::sigaction = std::mem::zeroed();
            let mut previous: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = atoll_oracle_handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            if libc::sigaction(signal, ptr::null(), &raw mut previous) != 0 {
                return Err(failed("sigaction"));
            }
            let chained = match previous.sa_sigaction {
                libc::SIG_DFL | libc::SIG_IGN => unexpected as *const () as u64,
                address => address as u64,
            };
            (&raw mut CONTEXT.previous[signal as usize]).write(chained);
            if libc::sigaction(signal, &raw const action, ptr::null_mut()) != 0 {
                return Err(failed("sigaction"));
            }
        }
    }
    Ok(())
}
