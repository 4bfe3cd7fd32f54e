//! Open connections of scrapers, and their limits.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Maximum of open connections; one more closes the oldest idle one.
const MAX_CONNECTIONS: usize = 16;
/// Maximum of open connections from one address.
const MAX_CONNECTIONS_PER_PEER: usize = 4;
/// Time of sending an answer after which its connection counts as idle.
const STALLED: Duration = Duration::from_secs(2);

/// Open connections, oldest first.
#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Vec<Arc<Entry>>>>);

struct Entry {
    peer: IpAddr,
    state: Mutex<State>,
    closed: Notify,
}

#[derive(Clone, Copy)]
pub enum State {
    /// The request has not arrived completely.
    Reading,
    /// The answer is being made.
    Answering,
    /// The answer has been sent since then.
    Writing(Instant),
}

/// An open connection; dropping it makes room for another.
pub struct Connection {
    entry: Arc<Entry>,
    all: Connections,
}

impl Connections {
    /// Admits a connection. At a limit, closes the oldest idle one, of the same address if the limit is
    /// that of the address. `None`: none is idle.
    pub fn admit(&self, peer: IpAddr) -> Option<Connection> {
        let mut all = lock(&self.0);
        let of_peer = all.iter().filter(|entry| entry.peer == peer).count();
        let has_many = of_peer >= MAX_CONNECTIONS_PER_PEER;
        if has_many || all.len() >= MAX_CONNECTIONS {
            let place = all.iter().position(|it| it.is_idle() && (it.peer == peer || !has_many))?;
            all.remove(place).closed.notify_one();
        }
        let (state, closed) = (Mutex::new(State::Reading), Notify::new());
        let entry = Arc::new(Entry { peer, state, closed });
        all.push(Arc::clone(&entry));
        Some(Connection { entry, all: self.clone() })
    }
}

impl Entry {
    fn is_idle(&self) -> bool {
        match *lock(&self.state) {
            State::Reading => true,
            State::Answering => false,
            State::Writing(since) => since.elapsed() > STALLED,
        }
    }
}

impl Connection {
    pub fn set(&self, state: State) {
        *lock(&self.entry.state) = state;
    }

    /// Waits until the connection has to be closed for another.
    pub async fn closed(&self) {
        self.entry.closed.notified().await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        lock(&self.all.0).retain(|entry| !Arc::ptr_eq(entry, &self.entry));
    }
}

/// Locks a mutex. A panic cannot leave its content inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{Connections, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER, State, lock};

    #[test]
    fn oldest_idle_connection_goes() {
        let peer = |number: u32| std::net::Ipv4Addr::from(number).into();
        let all = Connections::default();
        let open = || lock(&all.0).len();
        // one address gets no more than its part
        let first: Vec<_> = (0..MAX_CONNECTIONS_PER_PEER).map(|_| all.admit(peer(1))).collect();
        let more = all.admit(peer(1)).expect("the oldest goes");
        assert_eq!(open(), MAX_CONNECTIONS_PER_PEER);
        // those that are being answered stay
        first.iter().flatten().chain([&more]).for_each(|it| it.set(State::Answering));
        assert!(all.admit(peer(1)).is_none());
        let others: Vec<_> = (2..40).map(|number| all.admit(peer(number))).collect();
        assert!(others.iter().all(Option::is_some));
        assert_eq!(open(), MAX_CONNECTIONS);
        drop((first, more, others));
        assert_eq!(open(), 0);
    }
}
