//! A machine's network interfaces as the machine's process holds them.
//!
//! ```text
//!  description ──open──► Interface: Port, and the helper process behind it     lives as long as the run
//!                           │  events of the port
//!                           ▼
//!  network thread ──► Relay ──► Net (virtio device)                            lives as long as one machine
//! ```
//!
//! What was opened once stays for the whole run: a reset or a rebuild makes a new device over the same port. The
//! relay is what the port knows; it passes events on to the device that is there now, and tells whoever runs the
//! machine when the other side is gone.
//!
//! Ports and helper processes are made before the machine has threads, so that its process can leave the host's
//! network in between (`atoll_foundation::jail::leave_network`).
//!
//! Lock order: a relay's lock is a leaf; no device is called under it.

mod open;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use atoll_foundation::sync::lock;
use atoll_foundation::{EventLoop, EventLoopHandle};
use atoll_network::port::PortListener;
use atoll_network::{Port, PortEvent};
use atoll_virtio::net::{Net, NetLimits, NetOptions};

use crate::error::VmError;
use crate::event::{EventSink, VmEvent};

use open::Helper;
pub(crate) use open::{Around, open};

/// Most network interfaces of a machine.
pub(crate) const MAX_INTERFACES: usize = 8;

/// One interface, open.
pub(crate) struct Interface {
    /// Ends with the interface; before the port, whose end it would take for trouble.
    helper: Helper,
    port: Arc<dyn Port>,
    options: NetOptions,
    /// What counts now: the options' limits, until they are changed.
    limits: Mutex<NetLimits>,
    relay: Arc<Relay>,
}

/// What a port's events reach.
#[derive(Default)]
struct Relay {
    device: Mutex<Option<PortListener>>,
    /// The run is ending, and the other side with it.
    ending: AtomicBool,
    /// Tells whoever runs the machine that the other side is gone; set when the run starts.
    lost: OnceLock<Box<dyn Fn(String) + Send + Sync>>,
}

impl Relay {
    fn event(&self, name: &str, event: PortEvent) {
        if event == PortEvent::Link(false)
            && !self.ending.load(Ordering::SeqCst)
            && let Some(lost) = self.lost.get()
        {
            lost(format!("{name} is gone"));
        }
        let device = lock(&self.device).clone();
        if let Some(device) = device {
            device(event);
        }
    }
}

impl Interface {
    fn new(port: Arc<dyn Port>, options: NetOptions, helper: Helper) -> Self {
        let limits = Mutex::new(options.limits);
        Self { port, options, limits, relay: Arc::default(), helper }
    }

    /// A device for the next machine. From now on it gets the port's events.
    pub(crate) fn device(&self) -> Arc<Net> {
        let limits = *lock(&self.limits);
        let net = Net::new(self.port.clone(), &NetOptions { limits, ..self.options.clone() });
        self.attach(&net);
        net
    }

    /// Has `net`, which came from [`Interface::device`], get the port's events, and those that others may have got
    /// meanwhile.
    pub(crate) fn attach(&self, net: &Arc<Net>) {
        let listener = net.listener();
        *lock(&self.relay.device) = Some(listener.clone());
        for pair in 0..self.port.queue_pairs() {
            listener(PortEvent::Readable(pair));
            listener(PortEvent::Writable(pair));
        }
    }

    /// Limits for the device that is there and those that follow it.
    pub(crate) fn set_limits(&self, net: &Net, limits: NetLimits) {
        *lock(&self.limits) = limits;
        net.set_limits(limits);
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        self.relay.ending.store(true, Ordering::SeqCst);
    }
}

/// The thread on which ports have their events, for the whole run. Dropping it stops and joins the thread.
pub(crate) struct NetworkThread {
    handle: EventLoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl NetworkThread {
    /// Starts the thread and watches the ports; `None` when there are none.
    pub(crate) fn start(interfaces: &[Arc<Interface>], events: &EventSink) -> Result<Option<Self>, VmError> {
        if interfaces.is_empty() {
            return Ok(None);
        }
        let mut event_loop = EventLoop::new().map_err(VmError::host("cannot make the network event loop"))?;
        let handle = event_loop.handle();
        for (index, interface) in interfaces.iter().enumerate() {
            let sink = events.clone();
            let lost = move |why| sink(VmEvent::NetworkLost { interface: index, why });
            let _ = interface.relay.lost.set(Box::new(lost));
            let (relay, name) = (Arc::downgrade(&interface.relay), interface.port.name());
            let listener: PortListener = Arc::new(move |event| {
                if let Some(relay) = relay.upgrade() {
                    relay.event(&name, event);
                }
            });
            let watched = interface.port.watch(&handle, listener);
            watched.map_err(VmError::host("cannot watch a network port"))?;
            interface.helper.supervise()?;
        }
        let run = move || {
            if let Err(error) = event_loop.run() {
                tracing::error!("the network event loop ended: {error}");
            }
        };
        let thread = atoll_foundation::threads::spawn("network", run)
            .map_err(VmError::host("cannot start the network thread"))?;
        Ok(Some(Self { handle, thread: Some(thread) }))
    }
}

impl Drop for NetworkThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
