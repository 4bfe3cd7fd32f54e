//! The terminal: its size, and a screen that is given back as it was.

use std::io::{self, IsTerminal, Stdin, Write};
use std::mem::MaybeUninit;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Interval, MissedTickBehavior};

/// Columns and lines of the terminal on standard output; `None`: there is none.
pub fn size() -> Option<(usize, usize)> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: all zeroes are a winsize, which the kernel fills and which outlives the call.
    let size = unsafe {
        if libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, size.as_mut_ptr()) != 0 {
            return None;
        }
        size.assume_init()
    };
    // one that does not say is taken for the usual
    let or = |number: u16, usual| if number == 0 { usual } else { usize::from(number) };
    Some((or(size.ws_col, 80), or(size.ws_row, 24)))
}

/// Returns true if nobody will read standard output any more: its terminal or its reader is gone.
pub fn is_gone() -> bool {
    let mut output = libc::pollfd { fd: libc::STDOUT_FILENO, events: 0, revents: 0 };
    // SAFETY: one structure, that outlives the call, which does not wait.
    let ready = unsafe { libc::poll(&mut output, 1, 0) };
    ready > 0 && output.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

/// A key that was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Char(u8),
    Up,
    Down,
    PageUp,
    PageDown,
}

/// Why a [`Live`] view goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// The interval is over.
    Tick,
    Key(Key),
    /// SIGINT, SIGTERM or SIGHUP.
    End,
}

/// SIGINT, SIGTERM and SIGHUP.
pub struct Signals([Signal; 3]);

impl Signals {
    /// From now on they do not end the process. Must be inside a tokio runtime.
    pub fn new() -> io::Result<Signals> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Signals([interrupt?, terminate?, hangup?]))
    }

    /// Waits for one of them.
    pub async fn any(&mut self) {
        let Signals([interrupt, terminate, hangup]) = self;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }

    /// Whether one of them comes within a time.
    pub async fn within(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.any()).await.is_ok()
    }
}

/// A view that is shown again and again. On a terminal it has the whole screen, and reads keys;
/// the terminal is as it was when the value is gone.
pub struct Live {
    ticks: Interval,
    signals: Signals,
    on_screen: bool,
    keys: Option<AsyncFd<Stdin>>,
    /// How the terminal was.
    before: Option<libc::termios>,
}

impl Live {
    /// Must be inside a tokio runtime. The first tick is an interval from now.
    pub fn open(interval: Duration, keys: bool) -> io::Result<Live> {
        let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut live = Live {
            ticks,
            signals: Signals::new()?,
            on_screen: io::stdout().is_terminal(),
            keys: None,
            before: None,
        };
        if live.on_screen {
            // the other screen, without a cursor, and what is too long is cut
            io::stdout().write_all(b"\x1b[?1049h\x1b[?25l\x1b[?7l")?;
        }
        if live.on_screen && keys && io::stdin().is_terminal() {
            live.before = single_keys();
            // SAFETY: standard input is open as long as the process is.
            let keys = unsafe { AsyncFd::register_with_interest(io::stdin(), Interest::READABLE) };
            live.keys = keys.ok();
        }
        Ok(live)
    }

    /// Shows these lines instead of those before; elsewhere than on a terminal, after them.
    pub fn show(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !self.on_screen {
            out.write_all(text.as_bytes())?;
            return out.flush();
        }
        let lines = size().map_or(24, |(_, lines)| lines);
        let shown: Vec<&str> = text.lines().take(lines).collect();
        // from the upper left; what was in each line before, and what is below them
        write!(out, "\x1b[H\x1b[K{}", shown.join("\n\x1b[K"))?;
        if shown.len() < lines {
            write!(out, "\n\x1b[J")?;
        }
        out.flush()
    }

    /// Waits for the next thing to do.
    pub async fn woken(&mut self) -> Woken {
        let Live { ticks, signals, keys, .. } = self;
        tokio::select! {
            () = signals.any() => Woken::End,
            key = read_key(keys.as_ref()) => Woken::Key(key),
            _ = ticks.tick() => Woken::Tick,
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // SAFETY: a valid termios that outlives the call.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, before) };
        }
        if self.on_screen {
            // a terminal that is gone needs nothing back
            let mut out = io::stdout().lock();
            let _ = out.write_all(b"\x1b[?7h\x1b[?25h\x1b[?1049l");
            let _ = out.flush();
        }
    }
}

/// Keys arrive one by one and are not shown; returns how it was before.
fn single_keys() -> Option<libc::termios> {
    let mut before = MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: the kernel fills `before` where it returns 0, and both structs outlive the calls.
    unsafe {
        if libc::tcgetattr(libc::STDIN_FILENO, before.as_mut_ptr()) != 0 {
            return None;
        }
        let before = before.assume_init();
        let mut single = before;
        single.c_lflag &= !(libc::ICANON | libc::ECHO);
        // a read takes what there is and does not wait
        (single.c_cc[libc::VMIN], single.c_cc[libc::VTIME]) = (0, 0);
        libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &single);
        Some(before)
    }
}

async fn read_key(keys: Option<&AsyncFd<Stdin>>) -> Key {
    let Some(keys) = keys else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = keys.readable().await else { return std::future::pending().await };
        let mut bytes = [0_u8; 16];
        // SAFETY: the buffer is as long as said and outlives the call.
        let read =
            unsafe { libc::read(libc::STDIN_FILENO, bytes.as_mut_ptr().cast(), bytes.len()) };
        ready.clear_ready();
        if read <= 0 {
            // hung up perhaps: that is a signal of its own
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if let Some(key) = usize::try_from(read).ok().and_then(|read| key(&bytes[..read])) {
            return key;
        }
    }
}

fn key(bytes: &[u8]) -> Option<Key> {
    match bytes {
        b"\x1b[A" | b"\x1bOA" => Some(Key::Up),
        b"\x1b[B" | b"\x1bOB" => Some(Key::Down),
        b"\x1b[5~" => Some(Key::PageUp),
        b"\x1b[6~" => Some(Key::PageDown),
        [0x1b, _, ..] => None,
        [first, ..] => Some(Key::Char(*first)),
        [] => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{Key, key};

    #[test]
    fn keys_as_terminals_send_them() {
        assert_eq!(key(b"q"), Some(Key::Char(b'q')));
        assert_eq!(key(b"\x1b[A"), Some(Key::Up));
        assert_eq!(key(b"\x1b[6~"), Some(Key::PageDown));
        assert_eq!(key(b"\x1b[1;5C"), None);
        assert_eq!(key(b""), None);
    }
}
