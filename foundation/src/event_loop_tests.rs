//! Behaviour of the event loop.

use super::*;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;

const SOON: Option<Duration> = Some(Duration::from_millis(10));
const LONG: Duration = Duration::from_secs(10);

fn counter() -> (Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let counter = Arc::new(AtomicUsize::new(0));
    (counter.clone(), counter)
}

#[test]
fn a_signalled_source_runs_its_callback_until_it_is_drained() {
    let mut event_loop = EventLoop::new().unwrap();
    let event = Arc::new(EventFd::new().unwrap());
    let (calls, in_callback) = counter();
    let drained = event.clone();
    let callback = move |ready: Readiness| {
        assert!(ready.readable && !ready.error);
        if in_callback.fetch_add(1, Ordering::Relaxed) == 1 {
            drained.drain();
        }
    };
    event_loop.handle().register(event.clone(), Interest::READ, callback).unwrap();
    assert_eq!(event_loop.run_once(SOON).unwrap(), 0);
    event.signal();
    for expected in [1, 1, 0] {
        assert_eq!(event_loop.run_once(SOON).unwrap(), expected);
    }
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn posted_closures_run_in_order_on_the_loop_thread_and_stop_ends_run() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        event_loop.run().unwrap();
        std::thread::current().id()
    });
    for number in 0..100 {
        let (sender, inner) = (sender.clone(), handle.clone());
        assert!(handle.post(move || {
            assert!(inner.is_loop_thread());
            sender.send((number, std::thread::current().id())).unwrap();
        }));
    }
    assert!(!handle.is_loop_thread());
    handle.stop();
    let loop_thread = thread.join().unwrap();
    let order: Vec<_> = receiver.try_iter().collect();
    assert_eq!(order, (0..100).map(|n| (n, loop_thread)).collect::<Vec<_>>());
}

#[test]
fn a_stop_before_run_still_runs_what_was_posted() {
    let mut event_loop = EventLoop::new().unwrap();
    let (calls, in_closure) = counter();
    event_loop.handle().post(move || {
        in_closure.fetch_add(1, Ordering::Relaxed);
    });
    event_loop.handle().stop();
    event_loop.run().unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[test]
fn a_callback_can_remove_itself_and_others_in_the_same_round() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let tokens: Arc<Mutex<Vec<SourceToken>>> = Arc::default();
    let (calls, in_callback) = counter();
    let mut list = Vec::new();
    for _ in 0..5 {
        let event = EventFd::new().unwrap();
        event.signal();
        let (handle, tokens, calls) = (handle.clone(), tokens.clone(), in_callback.clone());
        let callback = move |_| {
            calls.fetch_add(1, Ordering::Relaxed);
            for token in lock(&tokens).drain(..) {
                assert!(handle.remove(token));
            }
        };
        list.push(event_loop.handle().register(event, Interest::READ, callback).unwrap());
    }
    *lock(&tokens) = list.clone();
    event_loop.run_once(SOON).unwrap();
    event_loop.run_once(SOON).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1, "events already fetched must not reach removed sources");
    assert!(!handle.remove(list[0]), "tokens stay dead");
}

#[test]
fn a_stale_event_does_not_reach_a_new_source_with_the_same_descriptor() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let (wrong, in_new) = counter();
    let victim_token: Arc<Mutex<Option<SourceToken>>> = Arc::default();
    // Two ready sources that each replace the other: whichever comes second in the round is stale.
    let (first, second) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let slots = [victim_token.clone(), Arc::default()];
    for (index, event) in [first, second].into_iter().enumerate() {
        event.signal();
        let (handle, other, wrong) = (handle.clone(), slots[1 - index].clone(), in_new.clone());
        let callback = move |_| {
            let Some(token) = lock(&other).take() else { return };
            assert!(handle.remove(token));
            let replacement = EventFd::new().unwrap();
            let wrong = wrong.clone();
            let count = move |_| {
                wrong.fetch_add(1, Ordering::Relaxed);
            };
            handle.register(replacement, Interest::READ, count).unwrap();
        };
        let token = event_loop.handle().register(event, Interest::READ, callback).unwrap();
        *lock(&slots[index]) = Some(token);
    }
    event_loop.run_once(SOON).unwrap();
    event_loop.run_once(SOON).unwrap();
    assert_eq!(wrong.load(Ordering::Relaxed), 0);
}

#[test]
fn a_paused_source_is_silent_even_after_hang_up() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let (near, far) = UnixStream::pair().unwrap();
    let hangups = Arc::new(AtomicUsize::new(0));
    let seen = hangups.clone();
    let callback = move |ready: Readiness| {
        seen.fetch_add(usize::from(ready.hangup), Ordering::Relaxed);
    };
    let token = handle.register(near, Interest::READ, callback).unwrap();
    handle.set_interest(token, Interest::NONE).unwrap();
    drop(far);
    assert_eq!(event_loop.run_once(SOON).unwrap(), 0);
    handle.set_interest(token, Interest::READ).unwrap();
    assert_eq!(event_loop.run_once(SOON).unwrap(), 1);
    assert_eq!(hangups.load(Ordering::Relaxed), 1);
    handle.set_interest(token, Interest::READ_WRITE).unwrap();
    handle.remove(token);
    assert!(handle.set_interest(token, Interest::READ).is_err());
}

#[test]
fn a_regular_file_is_always_ready_until_paused() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    for fd in [tempfile::tempfile().unwrap(), std::fs::File::open("/dev/null").unwrap()] {
        let token = handle.register(fd, Interest::READ, |ready| assert!(ready.readable)).unwrap();
        assert_eq!(event_loop.run_once(None).unwrap(), 1);
        assert_eq!(event_loop.run_once(None).unwrap(), 1);
        handle.set_interest(token, Interest::NONE).unwrap();
        assert_eq!(event_loop.run_once(SOON).unwrap(), 0);
        handle.set_interest(token, Interest::READ).unwrap();
        assert_eq!(event_loop.run_once(None).unwrap(), 1);
        assert!(handle.remove(token));
        assert_eq!(event_loop.run_once(SOON).unwrap(), 0);
    }
}

#[test]
fn remove_and_wait_returns_only_when_the_callback_has_returned() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let (entered, started) = mpsc::channel();
    let finished = Arc::new(AtomicBool::new(false));
    let event = EventFd::new().unwrap();
    event.signal();
    let in_callback = finished.clone();
    let callback = move |_| {
        entered.send(()).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        in_callback.store(true, Ordering::Release);
    };
    let token = handle.register(event, Interest::READ, callback).unwrap();
    let thread = std::thread::spawn(move || event_loop.run().unwrap());
    started.recv_timeout(LONG).unwrap();
    assert!(handle.remove_and_wait(token));
    assert!(finished.load(Ordering::Acquire));
    handle.stop();
    thread.join().unwrap();
}

#[test]
fn call_returns_the_result_of_a_closure_run_on_the_loop() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let thread = std::thread::spawn(move || event_loop.run().unwrap());
    let inner = handle.clone();
    assert_eq!(handle.call(move || inner.call(|| 42)), Some(Some(42)));
    handle.stop();
    thread.join().unwrap();
    assert_eq!(handle.call(|| 1), None, "the loop is gone");
    assert!(!handle.post(|| ()));
    assert!(handle.register(EventFd::new().unwrap(), Interest::READ, |_| ()).is_err());
}

#[test]
fn dropping_the_loop_drops_callbacks_that_hold_its_handle() {
    let event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let alive = Arc::new(());
    let (in_callback, in_closure) = ((alive.clone(), handle.clone()), (alive.clone(), handle.clone()));
    handle.register(EventFd::new().unwrap(), Interest::READ, move |_| drop(in_callback.clone())).unwrap();
    handle.post(move || drop(in_closure));
    assert_eq!(Arc::strong_count(&alive), 3);
    drop(event_loop);
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[test]
fn the_same_descriptor_twice_is_refused() {
    let event_loop = EventLoop::new().unwrap();
    let event = Arc::new(EventFd::new().unwrap());
    event_loop.handle().register(event.clone(), Interest::READ, |_| ()).unwrap();
    let error = event_loop.handle().register(event, Interest::READ, |_| ()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
}

#[test]
fn sources_come_and_go_from_many_threads_while_the_loop_runs() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let alive = Arc::new(());
    let thread = std::thread::spawn(move || event_loop.run().unwrap());
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (handle, alive) = (handle.clone(), alive.clone());
            scope.spawn(move || {
                for round in 0..300 {
                    let event = Arc::new(EventFd::new().unwrap());
                    let (called, was_called) = mpsc::channel();
                    let (drained, alive) = (event.clone(), alive.clone());
                    let callback = move |_| {
                        let _alive = &alive;
                        drained.drain();
                        let _ = called.send(());
                    };
                    let token = handle.register(event.clone(), Interest::READ, callback).unwrap();
                    event.signal();
                    if (round + worker) % 3 == 0 {
                        was_called.recv_timeout(LONG).unwrap();
                    }
                    handle.set_interest(token, Interest::READ).unwrap();
                    assert!(handle.remove_and_wait(token));
                    was_called.try_iter().count();
                    event.signal();
                    assert!(
                        was_called.recv_timeout(Duration::from_micros(50)).is_err(),
                        "called after removal"
                    );
                }
            });
        }
    });
    handle.stop();
    thread.join().unwrap();
    assert_eq!(Arc::strong_count(&alive), 1);
}
