//! Numbered datagrams through a lab's relay, and the last number that arrived at each of two receivers.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::lab::{CLIENTS, Lab, RELAY};
use super::net::bind;
use super::service::until;

/// Twice the time that a line lives without arpd, and more for a busy machine.
pub const AGED: Duration = Duration::from_millis(300);

/// The port of the relay that they are sent to.
pub const PORT: u16 = 5000;

/// A sender of numbered datagrams, and for each receiver the last number that has arrived there.
pub struct Flow {
    next: AtomicU64,
    last: [AtomicU64; 2],
    stop: AtomicBool,
}

impl Flow {
    fn send(&self, socket: &UdpSocket) {
        while !self.stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::SeqCst);
            // an ICMP error of before is reported here
            let _ = socket.send_to(&number.to_be_bytes(), (RELAY, PORT));
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn receive(&self, place: usize, socket: &UdpSocket) {
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
        let mut buffer = [0; 8];
        while !self.stop.load(Ordering::Relaxed) {
            if socket.recv(&mut buffer).is_ok() {
                self.last[place].fetch_max(u64::from_be_bytes(buffer), Ordering::SeqCst);
            }
        }
    }

    fn last(&self, place: usize) -> u64 {
        self.last[place].load(Ordering::SeqCst)
    }

    /// Waits until datagrams arrive at these receivers, and checks that none arrives at the others that is sent
    /// from now on.
    #[track_caller]
    pub fn expect_only(&self, wanted: [bool; 2]) {
        // one may be on its way
        let now = self.next.load(Ordering::SeqCst) + 1;
        for place in [0, 1].into_iter().filter(|place| wanted[*place]) {
            until("datagrams arrive", || self.last(place) > now + 500);
        }
        thread::sleep(AGED);
        for place in [0, 1].into_iter().filter(|place| !wanted[*place]) {
            assert!(
                self.last(place) <= now,
                "receiver {place} got {} after {now}",
                self.last(place)
            );
        }
    }
}

/// Runs `check` while datagrams are sent to [`PORT`] of the relay.
pub fn under_traffic(lab: &Lab, receivers: [UdpSocket; 2], check: impl FnOnce(&Flow)) {
    let flow = Flow {
        next: AtomicU64::new(1),
        last: [const { AtomicU64::new(0) }; 2],
        stop: AtomicBool::new(false),
    };
    let sender = bind(&lab.client, CLIENTS[0], 0);
    thread::scope(|scope| {
        scope.spawn(|| flow.send(&sender));
        for (place, receiver) in receivers.iter().enumerate() {
            let flow = &flow;
            scope.spawn(move || flow.receive(place, receiver));
        }
        // also if a check fails, otherwise the others would continue
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&flow)));
        flow.stop.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
