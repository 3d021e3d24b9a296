//! The driver: one thread owns a machine, everything asked of it queues up, and it decides.
//!
//! ```text
//!  Prepared ──start──► Running ──PowerOff, GuestPanic, TripleFault, DebugExit, stop──► Ended
//!                       ▲   │
//!                       └───┘ Reset (unless no_reboot), crash with on_crash = reset:
//!                             a new machine over the same memory, disks and consoles
//! ```
//!
//! [`VmHandle::rebuild`] puts a new machine together from the saved state of the running one and lets that go on,
//! on the same backend or on another: whatever a guest still notices is missing from the saved state. When that
//! fails, the machine that was there runs on.
//!
//! A machine is held while a disk of it cannot be read or written; `disks` has the states.
//!
//! Requests that arrive for a machine that was already torn down by a reset are dropped: each machine's
//! requests carry its incarnation.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use atoll_api_types::{Limits, OnCrash, VmSpec};
use atoll_foundation::log_limited;
use atoll_machine::control::{MachineControl, MachineRequest};
use atoll_storage::Disk;
use atoll_virtio::blk::Blk;
use atoll_virtio::net::{Net, NetLimits};

use crate::accelerator::{BackendKind, Choice};
use crate::config::Config;
use crate::console::{ConsoleId, ConsoleOutput};
use crate::disks::{DiskConfig, RETRY_TIME};
use crate::engine::Engine;
use crate::error::VmError;
use crate::event::{EventSink, VmEvent};
use crate::limits::rate_limits;
use crate::machine::{AnyMachine, MachineInputs, Sink};
use crate::network::{Interface, NetworkThread};

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reboot and `no_reboot` is set.
    Rebooted,
    /// The guest crashed; the text says how.
    Crashed(String),
    /// The debug-exit port was written.
    DebugExit(u32),
    /// Ended from outside.
    Stopped,
    /// Atoll or the host failed.
    Failed(String),
}

impl RunEnd {
    /// One word for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PoweredOff => "powered-off",
            Self::Rebooted => "rebooted",
            Self::Crashed(_) => "crashed",
            Self::DebugExit(_) => "debug-exit",
            Self::Stopped => "stopped",
            Self::Failed(_) => "failed",
        }
    }

    /// A line for people, where there is something to say.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Crashed(why) | Self::Failed(why) => Some(why),
            _ => None,
        }
    }

    /// The exit code of a process that ran the machine. A debug exit gives `2 * value + 1`, as test kernels
    /// know it from other machines.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Rebooted => 0,
            Self::Failed(_) => 1,
            Self::Crashed(_) => 3,
            Self::DebugExit(value) => (value << 1 | 1) as u8,
            Self::Stopped => 130,
        }
    }
}

/// Where a machine's output and news go. The functions run on the machine's threads.
pub struct VmOutputs {
    /// What the serial port prints.
    pub serial: ConsoleOutput,
    /// What the virtio console prints.
    pub virtio: ConsoleOutput,
    /// The machine was reset.
    pub rebooted: Box<dyn Fn() + Send>,
    /// Something happened that does not end the run. Must not wait for the machine.
    pub event: Box<dyn Fn(VmEvent) + Send + Sync>,
    /// The run is over. Called once.
    pub ended: Box<dyn FnOnce(RunEnd) + Send>,
}

enum Message {
    /// From the machine of this incarnation.
    Request(u64, MachineRequest),
    PowerButton,
    /// A disk keeps requests after an error of the host: its number and the error.
    DiskTrouble(usize, String),
    Resume,
    Rebuild(Option<BackendKind>, Sender<Result<u64, VmError>>),
    Stop,
}

/// What a machine gets besides its description.
#[derive(Default)]
pub struct Resources {
    /// Disks that are open already, after those that the description names: of a format or a layer that it cannot
    /// express, such as one that records for a test what the guest writes.
    pub disks: Vec<Arc<dyn Disk>>,
    /// The program that becomes a helper process when it is started with the name of one as its first argument
    /// (`network-user`). Without it there is no user-mode NAT.
    pub helper: Option<PathBuf>,
}

/// A machine that is checked and ready to start: its files are open, its images locked.
pub struct Vm {
    config: Config,
}

impl Vm {
    /// Opens and checks everything that `spec` names. Nothing is written and no thread is started.
    pub fn prepare(spec: &VmSpec) -> Result<Self, VmError> {
        Self::prepare_with(spec, Resources::default())
    }

    /// As [`Vm::prepare`], with more than a description can express. Helper processes are started; they end with
    /// the machine.
    pub fn prepare_with(spec: &VmSpec, resources: Resources) -> Result<Self, VmError> {
        Ok(Self { config: Config::with_resources(spec, resources)? })
    }

    /// As [`Vm::prepare`], with `disks` that are open already.
    pub fn prepare_with_disks(spec: &VmSpec, disks: Vec<Arc<dyn Disk>>) -> Result<Self, VmError> {
        Self::prepare_with(spec, Resources { disks, ..Resources::default() })
    }

    /// The machine in one line.
    pub fn summary(&self) -> String {
        self.config.summary()
    }

    /// What executes the machine's instructions, and why.
    pub fn accelerator(&self) -> &Choice {
        &self.config.accelerator
    }

    /// Why this process needs the host's network, if it does: otherwise it may leave it before the machine starts.
    pub fn needs_network(&self) -> Option<&str> {
        self.config.network_needed_by.as_deref()
    }

    /// Builds the machine and lets it run on threads of its own.
    pub fn start(self, outputs: VmOutputs) -> Result<VmHandle, VmError> {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(Shared {
            messages: sender,
            inputs: Mutex::new(None),
            disks: self.config.disks.iter().map(Arc::downgrade).collect(),
            networks: self.config.networks.iter().map(Arc::downgrade).collect(),
            window: Mutex::new(None),
            ended: AtomicBool::new(false),
        });
        let VmOutputs { serial, virtio, rebooted, event, ended } = outputs;
        let events = EventSink::from(event);
        let network = NetworkThread::start(&self.config.networks, &events)?;
        let mut driver = Driver {
            config: self.config,
            shared: shared.clone(),
            serial: serial.into(),
            virtio: virtio.into(),
            rebooted,
            _network: network,
            events,
            held: false,
            incarnation: 0,
        };
        let troubles = shared.messages.clone();
        driver.config.troubles.connect(Box::new(move |disk, why| {
            let _ = troubles.send(Message::DiskTrouble(disk, why));
        }));
        // The first machine is built here, so that what cannot be built is an error of this call.
        let machine = driver.build()?;
        let driving = shared.clone();
        let thread = move || {
            let end = driver.drive(machine, &receiver);
            // Whoever hears of the end may use the images at once: they are closed and unlocked before.
            drop(driver);
            driving.ended.store(true, Ordering::SeqCst);
            ended(end);
        };
        atoll_foundation::threads::spawn("driver", thread)
            .map_err(VmError::host("cannot start the driver thread"))?;
        Ok(VmHandle { shared })
    }
}

struct Shared {
    messages: Sender<Message>,
    /// The inputs of the machine that runs now.
    inputs: Mutex<Option<MachineInputs>>,
    /// Its disks, for as long as it has not ended.
    disks: Vec<Weak<DiskConfig>>,
    /// Its network interfaces, for as long as it has not ended.
    networks: Vec<Weak<Interface>>,
    /// Columns and rows last announced, for the next incarnation's console.
    window: Mutex<Option<(u16, u16)>>,
    ended: AtomicBool,
}

/// The outside's end of a running machine.
#[derive(Clone)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

impl VmHandle {
    /// Types `data` at console `id`; returns how many bytes the console took.
    pub fn console_input(&self, id: ConsoleId, data: &[u8]) -> usize {
        let inputs = self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        inputs.as_ref().map_or(0, |inputs| inputs.console_input(id, data))
    }

    /// Tells the virtio console the size of the window behind it.
    pub fn console_resized(&self, columns: u16, rows: u16) {
        *self.shared.window.lock().unwrap_or_else(PoisonError::into_inner) = Some((columns, rows));
        let inputs = self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inputs) = inputs.as_ref() {
            inputs.console_resized(columns, rows);
        }
    }

    /// Changes how much network interface `index` (counted from 0) may carry in each direction. False: the machine has
    /// no such interface, or is being replaced at this moment.
    pub fn set_network_limits(&self, index: usize, limits: &Limits) -> bool {
        let limits = rate_limits(limits);
        let both = NetLimits { send: limits, receive: limits };
        self.with_network(index, |interface, net| interface.set_limits(net, both))
    }

    /// Pulls the cable of network interface `index`, or plugs it in. False as in [`VmHandle::set_network_limits`].
    pub fn set_network_link(&self, index: usize, up: bool) -> bool {
        self.with_network(index, |_, net| net.set_link(up))
    }

    fn with_network(&self, index: usize, change: impl FnOnce(&Interface, &Arc<Net>)) -> bool {
        let inputs = self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner);
        let net = inputs.as_ref().and_then(|inputs| inputs.networks().get(index));
        match (self.shared.networks.get(index).and_then(Weak::upgrade), net) {
            (Some(interface), Some(net)) => {
                change(&interface, net);
                true
            }
            _ => false,
        }
    }

    /// Changes what disk `index` (counted from 0) may be read and written, at once. False: the machine has no such disk,
    /// or is being replaced at this moment.
    pub fn set_disk_limits(&self, index: usize, limits: &Limits) -> bool {
        let limits = rate_limits(limits);
        self.with_disk(index, |disk, device| disk.set_limits(device, limits)).is_some()
    }

    /// Makes disk `index` (counted from 0) `bytes` large; the guest is told. It cannot become smaller.
    pub fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), VmError> {
        let resized = self.with_disk(index, |disk, device| {
            device.resize(bytes).map_err(|error| VmError::Disk(format!("disk {}: {error}", disk.name)))
        });
        resized.unwrap_or_else(|| Err(VmError::Disk(format!("the machine has no disk {index}"))))
    }

    fn with_disk<R>(&self, index: usize, change: impl FnOnce(&DiskConfig, &Blk) -> R) -> Option<R> {
        let disk = self.shared.disks.get(index).and_then(Weak::upgrade)?;
        let device = {
            let inputs = self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner);
            inputs.as_ref().and_then(|inputs| inputs.disks().get(index).cloned())?
        };
        Some(change(&disk, &device))
    }

    /// Lets a machine that is held because of a disk try again now, not only at the next full second.
    pub fn resume(&self) {
        let _ = self.shared.messages.send(Message::Resume);
    }

    /// Presses the ACPI power button.
    pub fn power_button(&self) {
        let _ = self.shared.messages.send(Message::PowerButton);
    }

    /// Saves the machine's state, builds a new machine over the same memory, disks and consoles, and lets it go on
    /// from that state. Returns the size of the saved state in bytes. After an error the machine runs on as before.
    pub fn rebuild(&self) -> Result<u64, VmError> {
        self.rebuild_with(None)
    }

    /// As [`VmHandle::rebuild`], and the new machine runs on `backend`: the guest moves from one backend to
    /// the other. Fails, naming what is missing, where that backend cannot give the machine's CPU model.
    pub fn rebuild_on(&self, backend: BackendKind) -> Result<u64, VmError> {
        self.rebuild_with(Some(backend))
    }

    fn rebuild_with(&self, backend: Option<BackendKind>) -> Result<u64, VmError> {
        let (reply, answer) = mpsc::channel();
        let _ = self.shared.messages.send(Message::Rebuild(backend, reply));
        answer.recv().unwrap_or_else(|_| Err(VmError::Build("the run is over".to_owned())))
    }

    /// Ends the run as if the plug were pulled. The end is reported as [`RunEnd::Stopped`].
    pub fn stop(&self) {
        let _ = self.shared.messages.send(Message::Stop);
    }

    /// Whether the run is over.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::SeqCst)
    }
}

/// A machine's way to its driver.
struct Requests {
    incarnation: u64,
    messages: Mutex<Sender<Message>>,
}

impl MachineControl for Requests {
    fn request(&self, request: MachineRequest) {
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = messages.send(Message::Request(self.incarnation, request));
    }
}

struct Driver {
    config: Config,
    shared: Arc<Shared>,
    serial: Sink,
    virtio: Sink,
    rebooted: Box<dyn Fn() + Send>,
    /// After the configuration: ports end before the thread that watches them.
    _network: Option<NetworkThread>,
    events: EventSink,
    /// The machine is paused because a disk is in trouble.
    held: bool,
    incarnation: u64,
}

/// What a request leads to.
enum Decision {
    GoOn,
    Reset,
    Rebuild(Option<BackendKind>, Sender<Result<u64, VmError>>),
    End(RunEnd),
}

impl Driver {
    /// Builds the next incarnation, loaded and ready to resume.
    fn build(&mut self) -> Result<Box<dyn AnyMachine>, VmError> {
        self.incarnation += 1;
        let machine = self.build_empty()?;
        machine.load(&self.config)?;
        self.publish_inputs(&*machine);
        Ok(machine)
    }

    /// The same incarnation, put together once more: what `machine` asked for meanwhile still counts. Whichever
    /// machine is in place afterwards runs. Returns the size of the saved state.
    fn rebuild(
        &mut self,
        machine: &mut Box<dyn AnyMachine>,
        backend: Option<BackendKind>,
    ) -> Result<u64, VmError> {
        let engine = backend.map(Engine::open).transpose()?.unwrap_or_else(|| self.config.engine.clone());
        engine.check(&self.config.model)?;
        self.forget_inputs();
        machine.pause();
        let rebuilt = self.rebuilt(&**machine, engine);
        let result = rebuilt.map(|(new, size)| {
            *machine = new;
            size
        });
        let networks = machine.inputs();
        for (interface, net) in self.config.networks.iter().zip(networks.networks()) {
            interface.attach(net);
        }
        self.publish_inputs(&**machine);
        // What the disks keep is carried out again; if that fails, the machine is held again.
        self.held = false;
        machine.resume();
        result
    }

    fn rebuilt(
        &mut self,
        old: &dyn AnyMachine,
        engine: Engine,
    ) -> Result<(Box<dyn AnyMachine>, u64), VmError> {
        let saved = old.save()?;
        let before = std::mem::replace(&mut self.config.engine, engine);
        let new = self.build_empty().and_then(|new| match new.restore(&saved) {
            Ok(()) => Ok(new),
            Err(error) => Err(VmError::build(error)),
        });
        if new.is_err() {
            self.config.engine = before;
        }
        Ok((new?, saved.len() as u64))
    }

    fn build_empty(&self) -> Result<Box<dyn AnyMachine>, VmError> {
        let control = Arc::new(Requests {
            incarnation: self.incarnation,
            messages: Mutex::new(self.shared.messages.clone()),
        });
        self.config.engine.build(&self.config, control, self.serial.clone(), self.virtio.clone())
    }

    fn publish_inputs(&self, machine: &dyn AnyMachine) {
        let inputs = machine.inputs();
        if let Some((columns, rows)) = *self.shared.window.lock().unwrap_or_else(PoisonError::into_inner) {
            inputs.console_resized(columns, rows);
        }
        *self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner) = Some(inputs);
    }

    fn drive(&mut self, mut machine: Box<dyn AnyMachine>, messages: &Receiver<Message>) -> RunEnd {
        machine.resume();
        // The driver itself holds a sender, so the channel stays open.
        while let Some(message) = self.next(&*machine, messages) {
            match self.decide(&*machine, message) {
                Decision::GoOn => {}
                Decision::Rebuild(backend, reply) => {
                    let _ = reply.send(self.rebuild(&mut machine, backend));
                }
                Decision::End(end) => {
                    self.forget_inputs();
                    return end;
                }
                Decision::Reset => {
                    self.forget_inputs();
                    drop(machine);
                    machine = match self.build() {
                        Ok(machine) => machine,
                        Err(error) => return RunEnd::Failed(format!("cannot restart the machine: {error}")),
                    };
                    (self.rebooted)();
                    machine.resume();
                }
            }
        }
        RunEnd::Stopped
    }

    /// The next message. While the machine is held, its disks are tried again between messages.
    fn next(&mut self, machine: &dyn AnyMachine, messages: &Receiver<Message>) -> Option<Message> {
        while self.held {
            match messages.recv_timeout(RETRY_TIME) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Timeout) if machine.retry_disks() => self.release(machine),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        messages.recv().ok()
    }

    /// Pauses the machine because of a disk.
    fn hold(&mut self, machine: &dyn AnyMachine, disk: usize, why: String) {
        // While it is held, every attempt that fails says so again; and a disk may have been mended since.
        let keeps = machine.inputs().disks().get(disk).is_some_and(|disk| disk.kept() != 0);
        if self.held || !keeps {
            return;
        }
        machine.pause();
        self.held = true;
        let disk = self.config.disks.get(disk).map(|disk| disk.name.clone()).unwrap_or_default();
        (self.events)(VmEvent::DiskTrouble { disk, why });
    }

    /// Lets a machine that was held go on.
    fn release(&mut self, machine: &dyn AnyMachine) {
        self.held = false;
        (self.events)(VmEvent::DisksMended);
        machine.resume();
    }

    fn forget_inputs(&self) {
        *self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn decide(&mut self, machine: &dyn AnyMachine, message: Message) -> Decision {
        let request = match message {
            Message::Request(incarnation, request) if incarnation == self.incarnation => request,
            Message::Request(..) => return Decision::GoOn,
            Message::PowerButton => {
                machine.press_power_button();
                return Decision::GoOn;
            }
            Message::DiskTrouble(disk, why) => {
                self.hold(machine, disk, why);
                return Decision::GoOn;
            }
            Message::Resume => {
                if self.held && machine.retry_disks() {
                    self.release(machine);
                }
                return Decision::GoOn;
            }
            Message::Rebuild(backend, reply) => return Decision::Rebuild(backend, reply),
            Message::Stop => return Decision::End(RunEnd::Stopped),
        };
        match request {
            MachineRequest::PowerOff => Decision::End(RunEnd::PoweredOff),
            MachineRequest::Reset if self.config.no_reboot => Decision::End(RunEnd::Rebooted),
            MachineRequest::Reset => Decision::Reset,
            MachineRequest::GuestPanic => self.crashed("the guest reported a panic".to_owned()),
            MachineRequest::TripleFault { vcpu } => self.crashed(format!("triple fault on CPU {vcpu}")),
            MachineRequest::BeyondEngine { vcpu } => {
                self.crashed(format!("CPU {vcpu} did what the host's KVM cannot carry out; see the log"))
            }
            MachineRequest::DebugExit { value } => Decision::End(RunEnd::DebugExit(value)),
            MachineRequest::InternalError { vcpu } => {
                Decision::End(RunEnd::Failed(format!("CPU {vcpu} cannot continue; see the log")))
            }
        }
    }

    fn crashed(&self, why: String) -> Decision {
        match self.config.on_crash {
            OnCrash::Exit => Decision::End(RunEnd::Crashed(why)),
            OnCrash::Reset => {
                // A guest can crash as often as it likes.
                log_limited!(warn, "{why}; resetting the machine");
                Decision::Reset
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_that_the_documentation_promises() {
        for (end, code) in [
            (RunEnd::PoweredOff, 0),
            (RunEnd::Rebooted, 0),
            (RunEnd::Failed(String::new()), 1),
            (RunEnd::Crashed(String::new()), 3),
            (RunEnd::DebugExit(0), 1),
            (RunEnd::DebugExit(0x10), 33),
            (RunEnd::Stopped, 130),
        ] {
            assert_eq!(end.exit_code(), code, "{end:?}");
        }
    }
}
