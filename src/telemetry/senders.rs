//! Senders of the active generation's rules, for people and programs.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use crate::datapath::description::Generation;
use crate::datapath::pins::ReadGuard;
use crate::datapath::senders::{self, Record, SenderTables};
use crate::desired::sender_tables::SenderClock;

/// Time without packets after which a known sender is silent, where nothing else is asked for.
pub const SILENT_AFTER: Duration = Duration::from_secs(300);

/// A sender of a rule.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Sender<'a> {
    pub rule: &'a str,
    #[serde(rename = "sender")]
    pub address: IpAddr,
    pub state: SenderState,
    pub packets: u64,
    pub bytes: u64,
    /// Time since its first packet.
    #[serde(rename = "first_seconds")]
    pub first: f64,
    /// Time since its last packet.
    #[serde(rename = "last_seconds")]
    pub last: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SenderState {
    /// It has not sent for long: others may take its place.
    New,
    /// Known, and heard within the last minutes.
    Active,
    /// Known, and not heard any more.
    Silent,
    /// No rule of the key takes its packets.
    Refused,
}

impl SenderState {
    pub const ALL: [SenderState; 4] =
        [SenderState::New, SenderState::Active, SenderState::Silent, SenderState::Refused];

    pub fn word(self) -> &'static str {
        match self {
            SenderState::New => "new",
            SenderState::Active => "active",
            SenderState::Silent => "silent",
            SenderState::Refused => "refused",
        }
    }

    fn of(record: &Record, clock: &SenderClock, silent_after: Duration) -> SenderState {
        match clock.is_known(record.packets, record.first, record.last) {
            _ if record.refused => SenderState::Refused,
            false => SenderState::New,
            true if clock.since(record.last) >= silent_after => SenderState::Silent,
            true => SenderState::Active,
        }
    }
}

/// Returns the senders of a generation's rules that count them, or of one of them, by rule and address. A known
/// sender is silent after a time without packets.
pub fn read<'a>(
    guard: &ReadGuard,
    generation: &'a Generation,
    rule: Option<usize>,
    silent_after: Duration,
) -> anyhow::Result<Vec<Sender<'a>>> {
    let (desired, ids) = generation.hosts();
    let mut all = Vec::new();
    let rules = desired.rules.iter().zip(ids).enumerate();
    let mut counting = rules
        .filter(|(index, (it, _))| it.senders.is_some() && rule.is_none_or(|rule| rule == *index))
        .peekable();
    if counting.peek().is_none() {
        return Ok(all);
    }
    let (tables, clock) = (SenderTables::open(guard, generation)?, senders::clock(generation)?);
    for (_, (rule, ids)) in counting {
        let mut records = Records::default();
        tables.read(rule, ids, |record| records.add(record, &clock))?;
        let sender = |record: Record| Sender {
            rule: &rule.name,
            address: record.address,
            state: SenderState::of(&record, &clock, silent_after),
            packets: record.packets,
            bytes: record.bytes,
            first: clock.since(record.first).as_secs_f64(),
            last: clock.since(record.last).as_secs_f64(),
        };
        all.extend(records.0.into_values().map(sender));
    }
    Ok(all)
}

/// The senders of a rule by address; refused ones last.
#[derive(Default)]
struct Records(BTreeMap<(bool, IpAddr), Record>);

impl Records {
    /// Adds a sender unless it is forgotten. Two CPUs may have given it a place each.
    fn add(&mut self, record: Record, clock: &SenderClock) {
        if !clock.is_kept(record.last) {
            return;
        }
        let age = |moment| clock.since(moment);
        let known = self.0.entry((record.refused, record.address));
        known
            .and_modify(|it| {
                it.packets += record.packets;
                it.bytes += record.bytes;
                it.first = if age(it.first) < age(record.first) { record.first } else { it.first };
                it.last = if age(it.last) > age(record.last) { record.last } else { it.last };
            })
            .or_insert(record);
    }
}

/// Number of a rule's senders by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct SenderCounts {
    pub new: u64,
    pub active: u64,
    pub silent: u64,
    pub refused: u64,
    /// Time since the last packet of the known sender that has been silent for longest.
    #[serde(rename = "silence_seconds", skip_serializing_if = "Option::is_none")]
    pub silence: Option<f64>,
}

impl SenderCounts {
    pub fn of(&self, state: SenderState) -> u64 {
        match state {
            SenderState::New => self.new,
            SenderState::Active => self.active,
            SenderState::Silent => self.silent,
            SenderState::Refused => self.refused,
        }
    }

    fn add(&mut self, sender: &Sender<'_>) {
        match sender.state {
            SenderState::New => self.new += 1,
            SenderState::Active => self.active += 1,
            SenderState::Silent => self.silent += 1,
            SenderState::Refused => self.refused += 1,
        }
        if matches!(sender.state, SenderState::Active | SenderState::Silent) {
            self.silence = Some(self.silence.map_or(sender.last, |it| it.max(sender.last)));
        }
    }
}

/// Counts the senders of the rules that count them, by rule.
pub fn count<'a>(
    guard: &ReadGuard,
    generation: &'a Generation,
) -> anyhow::Result<BTreeMap<&'a str, SenderCounts>> {
    let counting = generation.description.desired.rules.iter().filter(|it| it.senders.is_some());
    let mut counts: BTreeMap<&str, SenderCounts> =
        counting.map(|rule| (rule.name.as_str(), SenderCounts::default())).collect();
    for sender in read(guard, generation, None, SILENT_AFTER)? {
        counts.entry(sender.rule).or_default().add(&sender);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Duration;

    use super::{Records, SILENT_AFTER, Sender, SenderCounts, SenderState};
    use crate::config::Flows;
    use crate::datapath::senders::Record;
    use crate::desired::flows::{self, FlowClock};
    use crate::desired::sender_tables::{SenderClock, settings};

    const NOW: u32 = 100;

    /// A clock whose beat is 128 ms.
    fn clock() -> SenderClock {
        let clock = FlowClock::new(flows::settings(&Flows::default(), 1000, 0), 1000, NOW);
        SenderClock { clock, settings: settings(1000) }
    }

    /// Returns a sender of ten packets, with the seconds since its first and last one.
    fn record(first: u32, last: u32) -> Record {
        let ago = |seconds: u32| NOW.wrapping_sub(seconds * 1000 / 128);
        let address: IpAddr = "10.0.9.1".parse().unwrap();
        let (first, last) = (ago(first), ago(last));
        Record { address, refused: false, packets: 10, bytes: 1000, first, last }
    }

    #[test]
    fn states_follow_packets_and_silence() {
        let state = |record| SenderState::of(&record, &clock(), SILENT_AFTER);
        assert_eq!(state(record(61, 0)), SenderState::Active);
        assert_eq!(state(record(59, 0)), SenderState::New);
        assert_eq!(state(Record { packets: 9, ..record(61, 0) }), SenderState::New);
        assert_eq!(state(record(900, 299)), SenderState::Active);
        assert_eq!(state(record(900, 301)), SenderState::Silent);
        assert_eq!(state(Record { refused: true, ..record(900, 301) }), SenderState::Refused);
        let after = Duration::from_secs(20);
        assert_eq!(SenderState::of(&record(900, 30), &clock(), after), SenderState::Silent);
    }

    #[test]
    fn a_sender_in_two_places_is_one() {
        let mut records = Records::default();
        for it in [
            record(500, 40),
            Record { packets: 3, bytes: 30, ..record(90, 7) },
            Record { refused: true, packets: 1, ..record(5, 5) },
            record(100_000, 86_402),
        ] {
            records.add(it, &clock());
        }
        let all: Vec<Record> = records.0.into_values().collect();
        let merged =
            Record { packets: 13, bytes: 1030, last: record(0, 7).last, ..record(500, 40) };
        assert_eq!(all, [merged, Record { refused: true, packets: 1, ..record(5, 5) }]);
    }

    #[test]
    fn known_senders_alone_have_a_silence() {
        let mut counts = SenderCounts::default();
        let mut add = |state, last| {
            let address: IpAddr = "10.0.9.1".parse().unwrap();
            let (packets, bytes, first) = (1, 60, 1000.0);
            counts.add(&Sender { rule: "r", address, state, packets, bytes, first, last });
            counts
        };
        assert_eq!(add(SenderState::New, 900.0).silence, None);
        assert_eq!(add(SenderState::Refused, 900.0).silence, None);
        assert_eq!(add(SenderState::Active, 30.0).silence, Some(30.0));
        assert_eq!(add(SenderState::Silent, 400.0).silence, Some(400.0));
        let counts = add(SenderState::Active, 2.0);
        assert_eq!(counts.silence, Some(400.0));
        assert_eq!(SenderState::ALL.map(|state| counts.of(state)), [1, 2, 1, 1]);
    }
}
