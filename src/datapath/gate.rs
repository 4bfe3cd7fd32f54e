//! The gate: the epoch, and the addresses that only the slow path may admit. The fast path reads it for each packet.

use std::mem::offset_of;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::Context;
use libbpf_rs::MapHandle;
use rustix::mm::ProtFlags;

use crate::bpf::{Mapped, types, wire};

/// The kernel's map: programs read and write it at the same time.
#[derive(Clone)]
pub struct Gate {
    map: Arc<MapHandle>,
    mapped: Arc<Mapped>,
}

impl Gate {
    pub fn open(map: MapHandle) -> anyhow::Result<Gate> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let mapped = Mapped::new(map.as_fd(), size_of::<types::gate>(), access);
        Ok(Gate { map: Arc::new(map), mapped: Arc::new(mapped.context("state/gate")?) })
    }

    /// Returns the map that the program reads.
    pub fn map(&self) -> &MapHandle {
        &self.map
    }

    /// Invalidates all lines: no packet that arrives later is sent by what was read before.
    pub fn advance(&self) {
        // SAFETY: the pointer is to a mapped struct, aligned to a page, which lives as long as `self`; all
        // access to the number is atomic.
        let epoch = unsafe { AtomicU32::from_ptr(&raw mut (*self.memory()).epoch) };
        // 0 is the epoch of lines that were never filled
        if epoch.fetch_add(1, Ordering::AcqRel) == u32::MAX {
            epoch.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Makes the Bloom filter one of these addresses; with `keep` also of those that it has.
    pub fn suspect(&self, addresses: impl Iterator<Item = IpAddr>, keep: bool) {
        for (place, new) in suspects(addresses).into_iter().enumerate() {
            // SAFETY: as above; there are as many words as `suspects` returns.
            let word = unsafe { AtomicU64::from_ptr(&raw mut (*self.memory()).suspects[place]) };
            let old = word.load(Ordering::Relaxed);
            let new = if keep { new | old } else { new };
            if new != old {
                word.store(new, Ordering::Relaxed);
            }
        }
    }

    fn memory(&self) -> *mut types::gate {
        self.mapped.memory().as_ptr().cast()
    }
}

/// Returns the Bloom filter of one hash: is_suspect() in bpf/admit.h has the same arithmetic.
pub fn suspects(addresses: impl Iterator<Item = IpAddr>) -> Vec<u64> {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    const BYTES: usize = size_of::<types::gate>() - offset_of!(types::gate, suspects);
    let mut filter = vec![0_u64; BYTES / size_of::<u64>()];
    let bits = filter.len().ilog2() + u64::BITS.ilog2();
    for address in addresses {
        let words = wire(address).map(u64::from);
        let (high, low) = match address {
            IpAddr::V4(_) => (0, words[0]),
            IpAddr::V6(_) => (words[0] << 32 | words[1], words[2] << 32 | words[3]),
        };
        let hash = (high.wrapping_mul(FACTOR) ^ low).wrapping_mul(FACTOR) >> (u64::BITS - bits);
        filter[hash as usize / 64] |= 1 << (hash % 64);
    }
    filter
}
