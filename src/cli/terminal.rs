//! The terminal: its size, keys and signals, and a full-screen view that restores it afterwards.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Stdin, Write};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{self, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Interval, MissedTickBehavior};

/// Returns columns and lines of the terminal on standard output, if there is one.
pub fn size() -> Option<(usize, usize)> {
    let size = termios::tcgetwinsize(io::stdout()).ok()?;
    // 0: unknown
    let or = |number: u16, usual| if number == 0 { usual } else { usize::from(number) };
    Some((or(size.ws_col, 80), or(size.ws_row, 24)))
}

/// Returns true if standard output has hung up: its terminal or reader is gone.
pub fn is_gone() -> bool {
    let stdout = io::stdout();
    let mut output = [PollFd::new(&stdout, PollFlags::empty())];
    let ready = poll(&mut output, Some(&Timespec::default()));
    ready.is_ok() && output[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Returns the columns to write in: COLUMNS if set, else those of the terminal.
pub fn width() -> Option<usize> {
    let set = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
    let of_terminal = || io::stdout().is_terminal().then(size).flatten().map(|(width, _)| width);
    set.filter(|width| *width > 0).or_else(of_terminal)
}

/// A pressed key.
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

/// Scroll position in a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scroll {
    /// Index of the line at the top.
    pub first: usize,
}

impl Scroll {
    /// Moves by a key; `page` of the `lines` fit on the screen.
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

    /// Returns the text from the line at the top.
    pub fn window<'t>(&self, text: &'t str) -> &'t str {
        let start = text.split_inclusive('\n').take(self.first).map(str::len).sum();
        &text[start..]
    }
}

/// Event that wakes a [`Live`] view.
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
    /// Catches the signals, so that they no longer end the process. Needs a tokio runtime.
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

    /// Returns true if one of them comes within a time.
    pub async fn within(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.any()).await.is_ok()
    }
}

/// A view that is redrawn at an interval. On a terminal it uses the whole screen and reads keys; dropping it
/// restores the terminal.
pub struct Live {
    ticks: Interval,
    signals: Signals,
    on_screen: bool,
    keys: Option<AsyncFd<Stdin>>,
    /// Keys that were read but not returned yet; `rest` is the beginning of another.
    typed: VecDeque<Key>,
    rest: Vec<u8>,
    /// Settings of the terminal before.
    before: Option<Termios>,
}

impl Live {
    /// Opens a view. The first tick is one interval from now. Needs a tokio runtime.
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
            // alternate screen, no cursor, no line wrap
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

    /// Redraws the screen with a text; without a terminal, appends it to the output.
    pub fn show(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !self.on_screen {
            out.write_all(text.as_bytes())?;
            return out.flush();
        }
        let lines = size().map_or(24, |(_, lines)| lines);
        let shown: Vec<&str> = text.lines().take(lines).collect();
        // from the upper left; erases the rest of each line, and all lines below
        write!(out, "\x1b[H\x1b[K{}", shown.join("\n\x1b[K"))?;
        if shown.len() < lines {
            write!(out, "\n\x1b[J")?;
        }
        out.flush()
    }

    /// Returns true if the view has a terminal.
    pub fn is_on_screen(&self) -> bool {
        self.on_screen
    }

    /// Waits for a key, a tick or a signal.
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
            let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
        if self.on_screen {
            // errors: the terminal is gone
            let mut out = io::stdout().lock();
            let _ = out.write_all(b"\x1b[?7h\x1b[?25h\x1b[?1049l");
            let _ = out.flush();
        }
    }
}

/// Switches off line buffering and echo, and returns the settings before.
fn single_keys() -> Option<Termios> {
    let before = termios::tcgetattr(io::stdin()).ok()?;
    let mut single = before.clone();
    single.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
    // reads do not block
    single.special_codes[SpecialCodeIndex::VMIN] = 0;
    single.special_codes[SpecialCodeIndex::VTIME] = 0;
    termios::tcsetattr(io::stdin(), OptionalActions::Now, &single).ok()?;
    Some(before)
}

async fn read_keys(keys: Option<&AsyncFd<Stdin>>) -> Vec<u8> {
    let Some(keys) = keys else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = keys.readable().await else { return std::future::pending().await };
        let mut bytes = [0_u8; 256];
        let read = rustix::io::read(io::stdin(), &mut bytes);
        ready.clear_ready();
        match read {
            Ok(read) if read > 0 => return bytes[..read].to_vec(),
            // perhaps hung up, which a signal reports
            _ => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Parses and removes all complete keys.
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

/// Parses the first key: its length, and the key if it is known. `None`: it is incomplete.
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

/// Parses a character of several bytes.
fn parse_character(bytes: &[u8]) -> Option<(usize, Option<Key>)> {
    let max = &bytes[..bytes.len().min(4)];
    let valid = match std::str::from_utf8(max) {
        Ok(text) => text,
        Err(error) if error.valid_up_to() > 0 => {
            std::str::from_utf8(&max[..error.valid_up_to()]).unwrap_or_default()
        }
        // the rest may still arrive
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
