//! Settings of devices that ethtool shows.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// Commands of `linux/ethtool.h` that read one number: the offloads as flags, and generic receive offload.
pub const FLAGS: u32 = 0x25;
pub const GRO: u32 = 0x2b;

/// Flags: the device takes VLAN tags out of frames, and merges packets.
pub const RX_VLAN: u32 = 1 << 8;
pub const LRO: u32 = 1 << 15;

/// Reads a number of a device; 0 if the device has none.
pub fn get(interface: &str, command: u32) -> u32 {
    let Ok(socket) = UdpSocket::bind("127.0.0.1:0") else { return 0 };
    let mut value = [command, 0];
    // SAFETY: all zeroes are an ifreq, whose name keeps its final zero; the kernel reads it and
    // writes an ethtool_value, two words, both of which outlive the call.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()).take(room) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL as _, &mut request)
    };
    if result == 0 { value[1] } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::{GRO, get};

    #[test]
    fn devices_that_are_missing_have_no_settings() {
        // every namespace's lo has it, and it cannot be switched off there
        assert_eq!((get("lo", GRO), get("nosuch0", GRO)), (1, 0));
    }
}
