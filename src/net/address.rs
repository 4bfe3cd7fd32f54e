//! Addresses that are added to interfaces and removed from them.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope, CacheInfo,
};

use super::{Netlink, family};

impl Netlink {
    /// Adds an address, as a network of one, to an interface.
    ///
    /// # Errors
    /// `AlreadyExists` if the interface has the address.
    pub async fn add_address(
        &self,
        ifindex: u32,
        address: IpAddr,
        lifetime: Option<Duration>,
    ) -> io::Result<()> {
        self.set_address(ifindex, address, lifetime, NLM_F_CREATE | NLM_F_EXCL).await
    }

    /// Sets the lifetime of an address from now on; `None`: for ever.
    pub async fn renew_address(
        &self,
        ifindex: u32,
        address: IpAddr,
        lifetime: Option<Duration>,
    ) -> io::Result<()> {
        self.set_address(ifindex, address, lifetime, NLM_F_REPLACE).await
    }

    async fn set_address(
        &self,
        ifindex: u32,
        address: IpAddr,
        lifetime: Option<Duration>,
        flags: u16,
    ) -> io::Result<()> {
        let mut message = message(ifindex, address);
        // whole seconds; the kernel's number for "for ever" is the greatest
        let seconds = lifetime.map_or(u32::MAX, |lifetime| lifetime.as_secs() as u32);
        let mut times = CacheInfo::default();
        (times.ifa_preferred, times.ifa_valid) = (seconds, seconds);
        message.attributes.push(AddressAttribute::CacheInfo(times));
        // nobody else on the link may have it: no duplicate address detection
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        let request = RouteNetlinkMessage::NewAddress(message);
        self.request(request, NLM_F_ACK | flags).await.map(drop)
    }

    /// Removes an address from an interface; a missing one is no error.
    pub async fn remove_address(&self, ifindex: u32, address: IpAddr) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelAddress(message(ifindex, address));
        match self.request(request, NLM_F_ACK).await {
            Err(error)
                if !matches!(
                    error.raw_os_error(),
                    Some(libc::EADDRNOTAVAIL | libc::ENODEV | libc::ENXIO)
                ) =>
            {
                Err(error)
            }
            _ => Ok(()),
        }
    }
}

fn message(ifindex: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = if address.is_ipv4() { 32 } else { 128 };
    message.header.scope = AddressScope::Universe;
    message.header.index = ifindex;
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}
