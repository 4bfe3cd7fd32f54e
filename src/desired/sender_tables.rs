//! Tables of the senders that rules count: their sizes, and which senders are known. Pure.

use std::time::Duration;

use crate::bpf::types::{sender_settings, sender_table};
use crate::config::Period;
use crate::desired::flows::{FlowClock, beats};
use crate::maglev::mix;

/// Senders in a bucket, of bpf/udplb.h.
const WAYS: u32 = 8;

/// A sender is known that has sent so many packets, in so long from first to last.
const KNOWN_PACKETS: u32 = 10;
const KNOWN_TIME: Period = Period::from_secs(60);

/// Time of silence after which a sender is forgotten.
const KEPT_TIME: Period = Period::from_secs(86_400);

/// The table of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenderTable {
    /// Id of the rule.
    pub rule: u32,
    /// Bits of a bucket's index.
    bits: u32,
}

impl SenderTable {
    /// Returns a table with two places for each sender, so that the two buckets of a sender are seldom full.
    pub fn new(rule: u32, senders: u32) -> SenderTable {
        let buckets = (2 * senders).div_ceil(WAYS).next_power_of_two();
        SenderTable { rule, bits: buckets.ilog2() }
    }

    pub fn buckets(self) -> u32 {
        1 << self.bits
    }

    /// Returns the value of a rule whose senders the table at an index counts.
    pub fn number(self, index: usize) -> sender_table {
        // there are fewer rules than 2^24
        sender_table((index as u32 + 1) | (self.bits << sender_table::TABLE_BITS_SHIFT.0))
    }
}

/// Returns the hash of a sender's address, as bpf/senders.h does.
pub fn hash(secret: u64, high: u64, low: u64) -> u64 {
    mix(mix(secret ^ high) ^ low)
}

/// Returns the program's settings for a clock of `ticks` jiffies per second.
pub fn settings(ticks: u32) -> sender_settings {
    sender_settings {
        known_packets: KNOWN_PACKETS,
        known_time: beats(KNOWN_TIME, ticks),
        kept_time: beats(KEPT_TIME, ticks),
    }
}

/// A moment by the clock of a generation's senders.
#[derive(Clone, Copy, Debug)]
pub struct SenderClock {
    pub clock: FlowClock,
    pub settings: sender_settings,
}

impl SenderClock {
    /// Returns the time since a sender's first or last packet.
    pub fn since(&self, moment: u32) -> Duration {
        self.clock.since(moment)
    }

    /// Returns true for a sender that no new one replaces: it has sent packets for long.
    pub fn is_known(&self, packets: u64, first: u32, last: u32) -> bool {
        let heard = u32::try_from(last.wrapping_sub(first) as i32).unwrap_or(0);
        packets >= self.settings.known_packets.into() && heard >= self.settings.known_time
    }

    /// Returns false for a sender that is forgotten.
    pub fn is_kept(&self, last: u32) -> bool {
        self.clock.beats_since(last) <= self.settings.kept_time
    }
}

#[cfg(test)]
mod tests {
    use super::{SenderClock, SenderTable, settings};
    use crate::config::Flows;
    use crate::desired::flows::{self, FlowClock};

    #[test]
    fn tables_have_two_places_for_each_sender() {
        for (senders, buckets) in
            [(16, 4), (17, 8), (32, 8), (4096, 1024), (4097, 2048), (262_144, 65_536)]
        {
            let table = SenderTable::new(7, senders);
            assert_eq!(table.buckets(), buckets, "{senders}");
            let number = table.number(2).0;
            assert_eq!((number & 0xff_ffff, 1 << (number >> 24)), (3, buckets));
        }
    }

    #[test]
    fn senders_are_known_by_packets_and_time() {
        let flows = flows::settings(&Flows::default(), 1000, 0);
        let now = 50;
        let clock =
            SenderClock { clock: FlowClock::new(flows, 1000, now), settings: settings(1000) };
        // a beat is 128 ms: a minute is 468, a day 675,000
        let first = |age| now - age;
        let ago = |age: u32| now.wrapping_sub(age);
        assert!(clock.is_known(10, ago(468), ago(0)));
        assert!(!clock.is_known(9, ago(468), ago(0)));
        assert!(!clock.is_known(10, ago(467), ago(0)));
        assert!(!clock.is_known(10, first(0), first(1)), "another CPU's clock");
        assert!(clock.is_kept(ago(675_000)) && !clock.is_kept(ago(675_001)));
        assert_eq!(clock.since(ago(1000)).as_millis(), 128_000);
    }
}
