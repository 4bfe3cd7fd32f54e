//! The terminal: its size, and a screen that is given back as it was.

use std::collections::VecDeque;
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

/// Columns to write in: those of the terminal, or COLUMNS where that is set; `None`: nobody said.
pub fn width() -> Option<usize> {
    let set = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let of_terminal = || io::stdout().is_terminal().then(size).flatten().map(|(width, _)| width);
    set.filter(|width| *width > 0).or_else(of_terminal)
}

/// A key that was pressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Char(char),
    Enter,
    Escape,
    Backspace,
    Up,
    Down,
    PageUp,
    PageDown,
    Home,
    End,
}

/// The part of a long text that is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scroll {
    /// The line at the top.
    pub first: usize,
}

impl Scroll {
    /// Moves by a key, among so many lines of which a page is shown.
    pub fn press(&mut self, key: Key, lines: usize, page: usize) {
        let page = page.max(1);
        self.first = match key {
            Key::Up | Key::Char('k') => self.first.saturating_sub(1),
            Key::Down | Key::Char('j') => self.first + 1,
            Key::PageUp => self.first.saturating_sub(page),
            Key::PageDown | Key::Char(' ') => self.first + page,
            Key::Home | Key::Char('g') => 0,
            Key::End | Key::Char('G') => lines,
            _ => self.first,
        };
        self.first = self.first.min(lines.saturating_sub(page));
    }

    /// The text from the line at the top on.
    pub fn window<'t>(&self, text: &'t str) -> &'t str {
        let start = text.split_inclusive('\n').take(self.first).map(str::len).sum();
        &text[start..]
    }
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
    /// Keys that were read and not taken yet, and the beginning of another.
    typed: VecDeque<Key>,
    rest: Vec<u8>,
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
            typed: VecDeque::new(),
            rest: Vec::new(),
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

    /// True if the view has a terminal's screen.
    pub fn is_on_screen(&self) -> bool {
        self.on_screen
    }

    /// Waits for the next thing to do.
    pub async fn woken(&mut self) -> Woken {
        let Live { ticks, signals, keys, typed, rest, .. } = self;
        loop {
            if let Some(key) = typed.pop_front() {
                return Woken::Key(key);
            }
            tokio::select! {
                () = signals.any() => return Woken::End,
                bytes = read_keys(keys.as_ref()) => {
                    rest.extend(bytes);
                    typed.extend(parse_keys(rest));
                }
                _ = ticks.tick() => return Woken::Tick,
            }
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

async fn read_keys(keys: Option<&AsyncFd<Stdin>>) -> Vec<u8> {
    let Some(keys) = keys else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = keys.readable().await else { return std::future::pending().await };
        let mut bytes = [0_u8; 256];
        // SAFETY: the buffer is as long as said and outlives the call.
        let read =
            unsafe { libc::read(libc::STDIN_FILENO, bytes.as_mut_ptr().cast(), bytes.len()) };
        ready.clear_ready();
        match usize::try_from(read) {
            Ok(read) if read > 0 => return bytes[..read].to_vec(),
            // hung up perhaps: that is a signal of its own
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Takes all keys out of what was read; the beginning of a key stays.
fn parse_keys(bytes: &mut Vec<u8>) -> Vec<Key> {
    let mut keys = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let Some((length, key)) = parse_key(&bytes[at..]) else { break };
        keys.extend(key);
        at += length;
    }
    bytes.drain(..at);
    keys
}

/// The length of the first key, and which it is if it is one of ours; `None`: it is not whole.
fn parse_key(bytes: &[u8]) -> Option<(usize, Option<Key>)> {
    let key = match bytes {
        [0x1b] => return Some((1, Some(Key::Escape))),
        [0x1b, b'[' | b'O', rest @ ..] => {
            // up to a letter or a tilde
            let end = rest.iter().position(|byte| (0x40..=0x7e).contains(byte))?;
            let key = match &rest[..=end] {
                b"A" => Some(Key::Up),
                b"B" => Some(Key::Down),
                b"H" | b"1~" | b"7~" => Some(Key::Home),
                b"F" | b"4~" | b"8~" => Some(Key::End),
                b"5~" => Some(Key::PageUp),
                b"6~" => Some(Key::PageDown),
                _ => None,
            };
            return Some((end + 3, key));
        }
        // with Alt
        [0x1b, _, ..] => return Some((2, None)),
        [b'\r' | b'\n', ..] => Key::Enter,
        [0x7f | 0x08, ..] => Key::Backspace,
        [first, ..] if first.is_ascii() => Key::Char(char::from(*first)),
        _ => return parse_character(bytes),
    };
    Some((1, Some(key)))
}

/// A character of several bytes.
fn parse_character(bytes: &[u8]) -> Option<(usize, Option<Key>)> {
    let most = &bytes[..bytes.len().min(4)];
    let valid = match std::str::from_utf8(most) {
        Ok(text) => text,
        Err(error) if error.valid_up_to() > 0 => {
            std::str::from_utf8(&most[..error.valid_up_to()]).unwrap_or_default()
        }
        // the rest of it may come
        Err(error) if error.error_len().is_none() => return None,
        Err(_) => return Some((1, None)),
    };
    let first = valid.chars().next()?;
    Some((first.len_utf8(), Some(Key::Char(first))))
}

#[cfg(test)]
mod tests {
    use super::{Key, Scroll, parse_keys};

    #[test]
    fn keys_are_read_as_terminals_send_them() {
        let keys = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            let keys = parse_keys(&mut bytes);
            (keys, bytes)
        };
        let all = |bytes: &[u8], wanted: &[Key]| assert_eq!(keys(bytes), (wanted.to_vec(), vec![]));
        all(b"q", &[Key::Char('q')]);
        all(b"\x1b[A\x1bOBmr", &[Key::Up, Key::Down, Key::Char('m'), Key::Char('r')]);
        all(b"\x1b[5~\x1b[6~", &[Key::PageUp, Key::PageDown]);
        all(b"\x1b[H\x1b[1~\x1bOF\x1b[4~", &[Key::Home, Key::Home, Key::End, Key::End]);
        all(b"/\xc3\xbc\x7f\r", &[Key::Char('/'), Key::Char('ü'), Key::Backspace, Key::Enter]);
        all(b"\x1b[1;5Cx", &[Key::Char('x')]);
        all(b"\x1b", &[Key::Escape]);
        all(b"", &[]);
        all(b"\xff", &[]);
        // the rest comes later
        assert_eq!(keys(b"a\x1b[5"), (vec![Key::Char('a')], b"\x1b[5".to_vec()));
        assert_eq!(keys(b"\xc3"), (vec![], b"\xc3".to_vec()));
    }

    #[test]
    fn scroll_stays_within_the_text() {
        let mut scroll = Scroll::default();
        for (key, first) in [
            (Key::Up, 0),
            (Key::Down, 1),
            (Key::PageDown, 6),
            (Key::PageDown, 7),
            (Key::Home, 0),
            (Key::End, 7),
            (Key::PageUp, 2),
        ] {
            scroll.press(key, 12, 5);
            assert_eq!(scroll.first, first, "{key:?}");
        }
        assert_eq!(scroll.window("a\nb\nc\nd\n"), "c\nd\n");
        scroll.press(Key::Down, 3, 5);
        assert_eq!(scroll.first, 0);
    }
}
