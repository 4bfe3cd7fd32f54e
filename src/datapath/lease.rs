//! The lease of the next hops: a heartbeat that the program in the kernel can see.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, bail};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use rustix::time::{ClockId, clock_getres, clock_gettime};

use crate::bpf::{self, UdplbSkelBuilder, from_bytes, types};
use crate::error::catch;

/// Renews the lease.
pub struct Heartbeat {
    program: OwnedFd,
    jiffies: u32,
    milliseconds: u32,
}

impl Heartbeat {
    /// Loads the program that knows the kernel's clock, for one map.
    pub fn load(map: &MapHandle, lease: Duration) -> anyhow::Result<Heartbeat> {
        catch(|| Heartbeat::load_for(map, lease)).flatten()
    }

    fn load_for(map: &MapHandle, lease: Duration) -> anyhow::Result<Heartbeat> {
        let mut object = MaybeUninit::uninit();
        let mut skeleton = UdplbSkelBuilder::default().open(&mut object)?;
        bpf::load_only(&mut skeleton, &["udplb_heartbeat"]);
        bpf::create_only(&mut skeleton, &["heartbeat"])?;
        skeleton.maps.heartbeat.reuse_fd(map.as_fd())?;
        let skeleton = skeleton.load().context("the kernel refuses the heartbeat")?;
        let program = skeleton.progs.udplb_heartbeat.as_fd().try_clone_to_owned()?;
        let milliseconds = u32::try_from(lease.as_millis())?;
        let jiffies = u64::from(milliseconds) * u64::from(ticks_per_second()?) / 1000;
        Ok(Heartbeat { program, jiffies: u32::try_from(jiffies)?.max(1), milliseconds })
    }

    /// Renews the lease from now on.
    pub fn beat(&self) -> anyhow::Result<()> {
        let result =
            bpf::run_program(self.program.as_fd(), [self.jiffies, self.milliseconds, 0, 0, 0])
                .context("heartbeat")?;
        if result != 0 {
            bail!("heartbeat: its map is not readable");
        }
        Ok(())
    }
}

/// Returns HZ: the resolution of the coarse clocks is one tick.
pub fn ticks_per_second() -> anyhow::Result<u32> {
    let tick = clock_getres(ClockId::MonotonicCoarse);
    Ok(1_000_000_000 / u32::try_from(tick.tv_nsec)?.max(1))
}

/// Returns the remaining time of the lease: zero once it has expired, `None` if there never was one.
pub fn remaining(map: &MapHandle) -> anyhow::Result<Option<Duration>> {
    let bytes = map.lookup(&0_u32.to_ne_bytes(), MapFlags::ANY)?.unwrap_or_default();
    let beat: types::heartbeat = from_bytes(&bytes).context("state/heartbeat is no heartbeat")?;
    if beat.until == 0 {
        return Ok(None);
    }
    let until = Duration::from_nanos(beat.until_ktime);
    Ok(Some(until.saturating_sub(monotonic())))
}

/// Returns the time of the program's clock, `CLOCK_MONOTONIC`.
pub fn monotonic() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    #[test]
    fn ticks_are_a_known_number() {
        let ticks = super::ticks_per_second().unwrap();
        assert!([100, 250, 300, 1000].contains(&ticks), "{ticks}");
    }
}
