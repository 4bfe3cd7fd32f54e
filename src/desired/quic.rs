//! The server's id in the connection id of a QUIC packet, as bpf/quic.h reads it. Pure.

use crate::config::{ServerId, ServerIdPlace};

/// Longest id, which the program reads whole, in bytes.
const READ: usize = ServerId::MAX;

/// Returns the bytes of a datagram at the place of the server's id (RFC 8999); `None` if it is too short, or its
/// connection id is.
pub fn server_id(payload: &[u8], place: ServerIdPlace) -> Option<ServerId> {
    const LONG_HEADER: u8 = 0x80;
    let (offset, length) = (usize::from(place.offset), usize::from(place.length));
    let connection_id = match payload.get(..6)? {
        [first, .., id_length] if first & LONG_HEADER != 0 => {
            (usize::from(*id_length) >= offset + length).then_some(6)?
        }
        _ => 1,
    };
    let read = payload.get(connection_id + offset..connection_id + offset + READ)?;
    Some(ServerId::from(&read[..length]))
}

#[cfg(test)]
mod tests {
    use super::server_id;
    use crate::config::ServerIdPlace;

    #[test]
    fn ids_are_in_both_headers() {
        let place = |offset, length| ServerIdPlace { offset, length };
        let id = |payload: &[u8], offset, length| {
            server_id(payload, place(offset, length)).map(|id| id.to_string())
        };
        let short = [&[0x40, 0, 0x0a, 0x01][..], &[7; 20]].concat();
        assert_eq!(id(&short, 1, 2).as_deref(), Some("0a01"));
        assert_eq!(id(&short, 0, 1).as_deref(), Some("00"));
        assert_eq!(id(&short[..9], 1, 2), None, "shorter than any packet of QUIC");
        let long = [&[0xc0, 0, 0, 0, 1, 3, 0, 0x0a, 0x01][..], &[7; 20]].concat();
        assert_eq!(id(&long, 1, 2).as_deref(), Some("0a01"));
        assert_eq!(id(&long, 1, 3), None, "beyond its connection id");
        assert_eq!(id(&[], 1, 2), None);
    }
}
