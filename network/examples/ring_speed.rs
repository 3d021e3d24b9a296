//! Measures the ring: `cargo run --release -p atoll-network --example ring_speed`. Two threads, one pair; for each
//! size of frame, one second each way, and the time of a round trip between two sleeping sides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use atoll_foundation::eventfd::wait_readable;
use atoll_foundation::{EventFd, EventLoop};
use atoll_network::FrameHeader;
use atoll_network::port::{Port, PortEvent, Received, Sent, Taken};
use atoll_network::ring::{self, Peer, RingPort};
use vm_memory::VolatileSlice;

const BATCH: usize = 64;
const TIME: Duration = Duration::from_secs(1);
const TICK: Option<Duration> = Some(Duration::from_millis(200));

fn main() {
    for size in [60, 1514, 9014, 65_549] {
        report("to the peer", size, to_peer(size));
        report("to the machine", size, to_machine(size));
    }
    println!("round trip of two sleeping sides: {:.1} us", round_trip().as_secs_f64() * 1e6);
}

fn report(way: &str, size: usize, frames: f64) {
    let gigabytes = frames * size as f64 / 1e9;
    println!("{way:>14}, {size:>5} bytes: {:>6.2} M frames/s, {gigabytes:>6.2} GB/s", frames / 1e6);
}

fn ring() -> (RingPort, Peer) {
    let (port, setup) = ring::create(1, ring::DEFAULT_RING_BYTES).expect("a ring");
    (port, Peer::attach(setup).expect("its other side"))
}

/// An eventfd that a port's events signal.
fn bell(port: &RingPort) -> (Arc<EventFd>, EventLoop) {
    let (events, bell) =
        (EventLoop::new().expect("an event loop"), Arc::new(EventFd::new().expect("an eventfd")));
    let signal = bell.clone();
    let listener = move |event| {
        if !matches!(event, PortEvent::Link(_)) {
            signal.signal();
        }
    };
    port.watch(&events.handle(), Arc::new(listener)).expect("watched");
    (bell, events)
}

fn to_peer(size: usize) -> f64 {
    let (port, mut peer) = ring();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut events = bell(&port).1;
            let mut frame = vec![1; size];
            let slice = VolatileSlice::from(&mut frame[..]);
            while !stop.load(Ordering::Relaxed) {
                let full = (0..BATCH)
                    .any(|_| port.send(0, &FrameHeader::default(), &[slice]).expect("sent") == Sent::Full);
                port.flush(0);
                if full {
                    events.run_once(TICK).expect("events");
                }
            }
        });
        let (mut frames, mut buffer, start) = (0u64, Vec::new(), Instant::now());
        while start.elapsed() < TIME {
            while peer.next(0, &mut buffer).expect("received").is_some() {
                frames += 1;
            }
            peer.ring_bells();
            wait_readable(peer.data_event(), TICK).expect("polled");
            peer.clear_events();
        }
        stop.store(true, Ordering::Relaxed);
        frames as f64 / start.elapsed().as_secs_f64()
    })
}

fn to_machine(size: usize) -> f64 {
    let (port, mut peer) = ring();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let frame = vec![1; size];
            while !stop.load(Ordering::Relaxed) {
                let full =
                    (0..BATCH).any(|_| !peer.push(0, &FrameHeader::default(), &[&frame]).expect("pushed"));
                peer.ring_bells();
                if full {
                    wait_readable(peer.room_event(), TICK).expect("polled");
                    peer.clear_events();
                }
            }
        });
        let mut events = bell(&port).1;
        let (mut frames, start) = (0u64, Instant::now());
        while start.elapsed() < TIME {
            while port.receive(0, &mut |_, _| Taken::Yes).expect("received") == Received::Frame {
                frames += 1;
            }
            events.run_once(TICK).expect("events");
        }
        stop.store(true, Ordering::Relaxed);
        frames as f64 / start.elapsed().as_secs_f64()
    })
}

fn round_trip() -> Duration {
    const TRIPS: u32 = 50_000;
    let (port, mut peer) = ring();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut buffer, mut done) = (Vec::new(), 0);
            while done < TRIPS {
                while let Some(header) = peer.next(0, &mut buffer).expect("received") {
                    peer.push(0, &header, &[&buffer]).expect("pushed");
                    done += 1;
                }
                peer.ring_bells();
                wait_readable(peer.data_event(), TICK).expect("polled");
                peer.clear_events();
            }
        });
        let mut events = bell(&port).1;
        let mut frame = [1; 60];
        let slice = VolatileSlice::from(&mut frame[..]);
        let start = Instant::now();
        for _ in 0..TRIPS {
            port.send(0, &FrameHeader::default(), &[slice]).expect("sent");
            port.flush(0);
            while port.receive(0, &mut |_, _| Taken::Yes).expect("received") == Received::Empty {
                events.run_once(TICK).expect("events");
            }
        }
        start.elapsed() / TRIPS
    })
}
