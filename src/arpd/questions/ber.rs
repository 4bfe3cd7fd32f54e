//! The part of BER that SNMPv2c's `sysUpTime` needs.

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const NULL: u8 = 0x05;
const OID: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const GET: u8 = 0xa0;
const RESPONSE: u8 = 0xa2;
const VERSION_2C: &[u8] = &[1];
/// sysUpTime.0, 1.3.6.1.2.1.1.3.0
const UPTIME: &[u8] = &[0x2b, 6, 1, 2, 1, 1, 3, 0];

/// Returns a request of `sysUpTime`.
pub fn get_uptime(community: &[u8], id: [u8; 4]) -> Vec<u8> {
    let binding = element(SEQUENCE, &[element(OID, UPTIME), element(NULL, &[])].concat());
    let zero = element(INTEGER, &[0]);
    let bindings = element(SEQUENCE, &binding);
    let body = [element(INTEGER, &id), zero.clone(), zero, bindings].concat();
    let message =
        [element(INTEGER, VERSION_2C), element(OCTETS, community), element(GET, &body)].concat();
    element(SEQUENCE, &message)
}

/// Returns true for a response without an error to the request with this id.
pub fn is_response(answer: &[u8], id: [u8; 4]) -> bool {
    fn body(answer: &[u8]) -> Option<(&[u8], &[u8])> {
        let (message, _) = take(SEQUENCE, answer)?;
        let (version, rest) = take(INTEGER, message)?;
        let (_, rest) = take(OCTETS, rest)?;
        let (body, _) = take(RESPONSE, rest)?;
        let (id, rest) = take(INTEGER, body)?;
        let (error, _) = take(INTEGER, rest)?;
        (version == VERSION_2C).then_some((id, error))
    }
    body(answer) == Some((&id, &[0]))
}

/// Returns an element. The contents are shorter than 2^16 bytes.
fn element(tag: u8, contents: &[u8]) -> Vec<u8> {
    let mut element = vec![tag];
    match contents.len() {
        length @ 0..=127 => element.push(length as u8),
        length => element.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    element.extend(contents);
    element
}

/// Splits off the contents of the first element, which must have this tag.
fn take(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (found, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match usize::from(*first) {
        length @ 0..=127 => (length, rest),
        // more than four bytes of length are longer than any datagram
        count @ 129..=132 => {
            let (length, rest) = rest.split_at_checked(count - 128)?;
            (length.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    (*found == tag).then(|| rest.split_at_checked(length)).flatten()
}
