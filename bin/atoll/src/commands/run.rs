//! `atoll run`: a machine in the foreground of this terminal.

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

use atoll_api_types::{
    Accelerator, BootSpec, CpuPinning, CpuTopology, DiskSpec, MemorySpec, NetArgument, OnCrash, VmSpec,
};
use atoll_foundation::jail;
use atoll_foundation::signals::{Signal, Signals};
use atoll_foundation::terminal;
use atoll_foundation::{EventLoop, Interest};
use atoll_vmm::{Choice, ConsoleId, Resources, RunEnd, Vm, VmHandle, VmOutputs};

use crate::VerbResult;
use crate::commands::quick_start;
use crate::console::{Console, UserRequest};
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  atoll run
      a shell in a fresh Linux, nothing to prepare
  atoll run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  atoll run disk.img --kernel vmlinuz --append 'console=ttyS0 root=/dev/vda'
  atoll run --net user,forward=tcp:2222:22
      port 2222 of this host leads to port 22 of the guest

In a terminal, Ctrl-C goes to the guest; Ctrl-A x ends the machine, and
Ctrl-A h lists the other keys. Signals (INT, TERM, HUP) from outside press the
power button the first time; the second time, or after 30 seconds, they end the
machine.

Exit codes: 0 powered off, or rebooted with --no-reboot; 1 the host failed;
2 wrong usage or input; 3 the guest crashed; 130 ended by the user.";

#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// First disk of the machine: an image (raw, .qcow2) or a block device; needs --kernel
    image: Option<DiskSpec>,

    /// Kernel to start: Linux bzImage, PVH or plain ELF, Multiboot 1
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel", help_heading = "Boot")]
    initrd: Option<PathBuf>,
    /// Kernel command line (without --kernel: added to the quick start's)
    #[arg(long, value_name = "TEXT", help_heading = "Boot")]
    append: Option<String>,

    /// Processors: a number, or sockets=S,cores=C,threads=T
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Machine")]
    cpus: CpuTopology,
    /// RAM: SIZE[,hugepages=2M|1G|transparent|off][,lock][,prefault][,numa=NODE]
    #[arg(long, value_name = "MEMORY", default_value = "512M", help_heading = "Machine")]
    memory: MemorySpec,
    /// Disk: PATH[,readonly][,format=raw|qcow2]; may be given several times
    #[arg(long = "disk", value_name = "DISK", help_heading = "Machine")]
    disks: Vec<DiskSpec>,
    /// Network: user, none, tap, macvtap or passt, with options such as user,forward=tcp:2222:22; may be given
    /// several times
    #[arg(long = "net", value_name = "NET", help_heading = "Machine")]
    nets: Vec<NetArgument>,
    /// CPU model; `atoll cpus` lists them
    #[arg(long, value_name = "MODEL", default_value = atoll_api_types::DEFAULT_CPU, help_heading = "Machine")]
    cpu: String,
    /// What executes the guest's instructions
    #[arg(long, value_name = "WHICH", default_value = "auto", help_heading = "Machine")]
    accel: AcceleratorArg,
    /// Host CPUs to run on: 0-3,8 for every CPU alike, or a list per CPU such as 0:1:4-5
    #[arg(long, value_name = "LIST", help_heading = "Machine")]
    pin: Option<CpuPinning>,
    /// Name of the machine
    #[arg(long, default_value = "vm", help_heading = "Machine")]
    name: String,

    /// What a crash of the guest leads to
    #[arg(long, value_name = "WHAT", default_value = "exit", help_heading = "Lifecycle")]
    on_crash: OnCrashArg,
    /// A reboot of the guest ends the run
    #[arg(long, help_heading = "Lifecycle")]
    no_reboot: bool,
    /// Port 0xf4 ends the run with exit code 2 * value + 1: for kernels that are tests
    #[arg(long, help_heading = "Lifecycle")]
    debug_exit: bool,
    /// Print how the run ended as one line of JSON on standard error
    #[arg(long, help_heading = "Lifecycle")]
    json: bool,
    /// Say nothing about the machine at its start
    #[arg(long, short, help_heading = "Lifecycle")]
    quiet: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum AcceleratorArg {
    Auto,
    Kvm,
    Software,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OnCrashArg {
    Exit,
    Reset,
}

impl Args {
    fn into_spec(self) -> Result<VmSpec, Failure> {
        let networks = NetArgument::interfaces(self.nets).map_err(Failure::input)?;
        let boot = match (self.kernel, &self.image) {
            (None, Some(image)) => {
                return Err(Failure::input(format_args!(
                    "{}: booting from a disk needs firmware, which this version does not have yet; add --kernel FILE \
                     (and --append 'root=/dev/vda ...')",
                    image.path.display()
                )));
            }
            (None, None) => quick_start::boot(self.append.as_deref())?,
            (kernel, _) => BootSpec { kernel, initrd: self.initrd, append: self.append.unwrap_or_default() },
        };
        Ok(VmSpec {
            accel: match self.accel {
                AcceleratorArg::Auto => Accelerator::Auto,
                AcceleratorArg::Kvm => Accelerator::Kvm,
                AcceleratorArg::Software => Accelerator::Software,
            },
            cpu: self.cpu,
            cpus: self.cpus,
            memory: self.memory.size,
            memory_options: self.memory.options,
            pin: self.pin,
            boot,
            disks: self.image.into_iter().chain(self.disks).collect(),
            networks,
            on_crash: match self.on_crash {
                OnCrashArg::Exit => OnCrash::Exit,
                OnCrashArg::Reset => OnCrash::Reset,
            },
            no_reboot: self.no_reboot,
            debug_exit: self.debug_exit,
            ..VmSpec::named(self.name)
        })
    }
}

/// What ends the wait of the main thread.
enum Event {
    Ended(RunEnd),
    Quit,
}

/// This program, also after its file was replaced.
const SELF: &str = "/proc/self/exe";

/// The machine's own process needs no network: whoever breaks out of a guest finds none. What talks to the network
/// is another process, and what is open stays usable. Threads must not be running yet.
fn leave_network(vm: &Vm) {
    match vm.needs_network() {
        Some(why) => tracing::info!("this process keeps the host's network: {why}"),
        None => {
            // Not inside the macro, which looks at its arguments only when somebody reads the log.
            let network = jail::leave_network();
            tracing::info!("{network}");
        }
    }
}

pub(crate) fn run(args: Args) -> VerbResult {
    let (json, quiet) = (args.json, args.quiet);
    // Everything that can be wrong with the input is found here, before a thread or a file is made.
    let resources = Resources { helper: Some(SELF.into()), ..Resources::default() };
    let vm = Vm::prepare_with(&args.into_spec()?, resources)?;
    leave_network(&vm);
    let (summary, accelerator) = (vm.summary(), vm.accelerator().clone());
    let signals =
        Signals::block(&[Signal::Interrupt, Signal::Terminate, Signal::HangUp, Signal::WindowChange])?;
    let console = Console::new()?;
    let raw = console.raw_mode()?;
    if !quiet {
        introduce(&summary, &accelerator, raw.is_some(), json);
    }
    let (events, ended) = mpsc::channel();
    let handle = vm.start(VmOutputs {
        serial: Box::new(console.sink(ConsoleId::Serial)),
        virtio: Box::new(console.sink(ConsoleId::Virtio)),
        rebooted: Box::new(console.rebooted()),
        event: Box::new(|event| eprint!("atoll: {event}\r\n")),
        ended: {
            let events = events.clone();
            Box::new(move |end| {
                let _ = events.send(Event::Ended(end));
            })
        },
    })?;
    announce_window_size(&handle);
    {
        let (events, handle) = (events.clone(), handle.clone());
        console.read_input(handle.clone(), raw.is_some(), move |request| match request {
            UserRequest::Quit => drop(events.send(Event::Quit)),
            UserRequest::PowerButton => handle.power_button(),
        })?;
    }
    watch_signals(signals, handle.clone(), events)?;
    let end = match ended.recv() {
        Ok(Event::Ended(end)) => end,
        Ok(Event::Quit) | Err(_) => {
            handle.stop();
            RunEnd::Stopped
        }
    };
    console.finish();
    drop(raw);
    report(&end, &accelerator, json)
}

/// What the user should know at the start: to people at a terminal the machine, to everybody its accelerator. JSON
/// has the accelerator in its one line at the end.
fn introduce(summary: &str, accelerator: &Choice, terminal: bool, json: bool) {
    let end = if terminal { "\r\n" } else { "\n" };
    if terminal {
        eprint!("atoll: {summary}; Ctrl-A x ends it, Ctrl-A h helps{end}");
    }
    if !json {
        eprint!("atoll: {accelerator}{end}");
        if let Some(warning) = &accelerator.warning {
            eprint!("atoll: warning: {warning}{end}");
        }
    }
}

/// The guest's virtio console has the size of our terminal.
fn announce_window_size(handle: &VmHandle) {
    if let Some(size) = terminal::window_size(std::io::stdout()) {
        handle.console_resized(size.columns, size.rows);
    }
}

/// How long a guest has to power off after a signal.
const GRACE: Duration = Duration::from_secs(30);

/// The first SIGINT, SIGTERM or SIGHUP presses the power button; a second one, or [`GRACE`], ends the machine.
fn watch_signals(signals: Signals, handle: VmHandle, events: mpsc::Sender<Event>) -> Result<(), Failure> {
    let mut event_loop = EventLoop::new()?;
    let signals = std::sync::Arc::new(signals);
    let source = signals.clone();
    let mut pressed = false;
    event_loop.handle().register(source, Interest::READ, move |_| {
        while let Ok(Some(received)) = signals.next() {
            match received.signal {
                Signal::WindowChange => announce_window_size(&handle),
                _ if pressed => drop(events.send(Event::Quit)),
                _ => {
                    pressed = true;
                    handle.power_button();
                    eprint!(
                        "atoll: pressed the guest's power button; a second signal, or {} seconds, end the machine\r\n",
                        GRACE.as_secs()
                    );
                    let events = events.clone();
                    let _ = atoll_foundation::threads::spawn("grace", move || {
                        std::thread::sleep(GRACE);
                        let _ = events.send(Event::Quit);
                    });
                }
            }
        }
    })?;
    atoll_foundation::threads::spawn("signals", move || event_loop.run())?;
    Ok(())
}

/// Says how the run ended and gives the exit code.
fn report(end: &RunEnd, accelerator: &Choice, json: bool) -> VerbResult {
    if json {
        let line = serde_json::json!({
            "end": end.name(),
            "detail": end.detail(),
            "exit_code": end.exit_code(),
            "accelerator": { "name": accelerator.backend.name(), "why": accelerator.why },
        });
        eprintln!("{line}");
    } else if let Some(detail) = end.detail() {
        eprintln!("atoll: {detail}");
    }
    Ok(end.exit_code())
}
