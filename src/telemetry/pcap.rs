//! Capture files in the classic pcap format with nanoseconds, as read by tcpdump and Wireshark.

use std::io::{self, Write};
use std::time::Duration;

use crate::bpf::types;

const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: [u16; 2] = [2, 4];
/// Snapshot length in the header; no frame is longer.
const SNAPLEN: u32 = 262_144;
const ETHERNET: u32 = 1;

/// Writer of a capture file.
pub struct Pcap<W>(W);

impl<W: Write> Pcap<W> {
    /// Writes the header of the file.
    pub fn new(mut file: W) -> io::Result<Pcap<W>> {
        let [major, minor] = VERSION.map(u16::to_le_bytes);
        // no time zone, no accuracy
        let words = [0, 0, SNAPLEN, ETHERNET].map(u32::to_le_bytes);
        file.write_all(&MAGIC.to_le_bytes())?;
        file.write_all(&[major, minor].concat())?;
        file.write_all(&words.concat())?;
        Ok(Pcap(file))
    }

    /// Appends the captured part of a frame; `time` is since 1970.
    pub fn add(&mut self, time: Duration, frame: &types::snapshot) -> io::Result<()> {
        let captured = (frame.captured as usize).min(frame.bytes.len());
        let words = [time.as_secs() as u32, time.subsec_nanos(), captured as u32, frame.length];
        self.0.write_all(&words.map(u32::to_le_bytes).concat())?;
        self.0.write_all(&frame.bytes[..captured])
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Pcap, types};

    #[test]
    fn a_file_of_one_frame() {
        let mut file = Vec::new();
        let mut pcap = Pcap::new(&mut file).expect("a header");
        let frame = types::snapshot { length: 60, captured: 2, bytes: [7; 128] };
        pcap.add(Duration::new(3, 5), &frame).expect("a frame");
        let wanted = [
            "4d3cb2a1 0200 0400 00000000 00000000 00000400 01000000",
            "03000000 05000000 02000000 3c000000 0707",
        ];
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, wanted.concat().replace(' ', ""));
    }
}
