use std::net::IpAddr;

use proptest::prelude::*;

use super::*;
use crate::config::health::Health;

const NONCE: Nonce = *b"0123456789abcdef";
const HOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 9, 11));

fn checks() -> Vec<Check> {
    let words = ["icmp", "dns", "ntp", "snmp", "sip"].map(|word| {
        let health: Health = crate::config::Config::parse(
            "a.json",
            &format!(
                r#"{{"version":1,"rules":[{{"key":{{"address":"10.0.0.5","port":53}},
                "options":{{"health":"{word}"}},"upstream":[{{"address":"10.0.9.11"}}]}}]}}"#
            ),
        )
        .expect("valid")
        .rules
        .remove(0)
        .health;
        health.probe().expect("a probe").check.clone()
    });
    let mut checks = words.to_vec();
    checks.push(Check::Radius { port: None, secret: "testing123".into() });
    checks.push(Check::Udp { send: "ping".into(), expect: Some("pong".into()), port: None });
    checks.push(Check::Dns { port: None, name: Some("example.org".into()) });
    checks
}

/// Returns an answer as the protocol's documents have it.
fn answer(check: &Check, question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    match check {
        Check::Icmp {} => answer[0] = 0,
        Check::Dns { .. } => answer[2] |= 0x80,
        Check::Ntp { .. } => {
            (answer[0], answer[1]) = (0x24, 2);
            answer.copy_within(40..48, 24);
        }
        Check::Snmp { .. } => {
            let get = answer.iter().position(|byte| *byte == 0xa0).expect("a request");
            answer[get] = 0xa2;
        }
        Check::Sip { .. } => {
            let text = String::from_utf8(answer).expect("text");
            let headers = text.split_once("\r\n").expect("lines").1;
            answer = format!("SIP/2.0 200 OK\r\n{headers}").into_bytes();
        }
        Check::Radius { secret, .. } => {
            let id = question[1];
            answer = [&[2, id, 0, 20][..], &NONCE].concat();
            let digest = Md5::digest([&answer[..], secret.as_bytes()].concat());
            answer[4..20].copy_from_slice(&digest);
        }
        _ => answer = b"pong".to_vec(),
    }
    answer
}

#[test]
fn answers_count_and_questions_do_not() {
    for check in checks() {
        let question = question(&check, &NONCE, HOST);
        let answer = answer(&check, &question);
        assert!(is_answer(&check, &NONCE, &answer), "{check:?}");
        assert!(!is_answer(&check, &NONCE, &question), "{check:?}");
        assert!(!is_answer(&check, &NONCE, &answer[..answer.len() / 3]), "{check:?}");
        let other = [7; 16];
        let is_custom = matches!(check, Check::Udp { .. });
        assert_eq!(is_answer(&check, &other, &answer), is_custom, "{check:?} of another question");
    }
}

#[test]
fn bad_news_are_no_answers() {
    type Spoil = fn(&mut Vec<u8>);
    let table: [(usize, Spoil); 7] = [
        // SERVFAIL
        (1, |answer| answer[3] |= 2),
        // unsynchronised, and the kiss of death
        (2, |answer| answer[0] |= 0xc0),
        (2, |answer| answer[1] = 0),
        (3, |answer| answer[0] = 0x31),
        (4, |answer| answer[8] = b'5'),
        (5, |answer| answer[10] ^= 1),
        // NXDOMAIN of a name that must exist
        (7, |answer| answer[3] |= 3),
    ];
    for (nth, spoil) in table {
        let check = &checks()[nth];
        let mut answer = answer(check, &question(check, &NONCE, HOST));
        spoil(&mut answer);
        assert!(!is_answer(check, &NONCE, &answer), "{check:?}");
    }
}

#[test]
fn root_question_takes_a_refusal() {
    let check = &checks()[1];
    let mut answer = answer(check, &question(check, &NONCE, HOST));
    answer[3] |= 5;
    assert!(is_answer(check, &NONCE, &answer));
}

#[test]
fn http_answers_are_judged_by_status() {
    assert_eq!(http_answer(None, b"HTTP/1.1 20"), None);
    assert_eq!(http_answer(None, b"HTTP/1.1 204 No Content\r\nA: b\r\n"), Some(true));
    assert_eq!(http_answer(None, b"HTTP/1.0 503 Sorry\r\n\r\n"), Some(false));
    assert_eq!(http_answer(Some(503), b"HTTP/1.0 503 Sorry\r\n\r\n"), Some(true));
    assert_eq!(http_answer(None, b"SSH-2.0-OpenSSH\r\n"), Some(false));
}

proptest! {
    #[test]
    fn garbage_is_refused_without_panic(answer in prop::collection::vec(any::<u8>(), 0..100)) {
        for check in checks() {
            if !matches!(check, Check::Udp { .. }) {
                prop_assert!(!is_answer(&check, &NONCE, &answer));
            }
        }
        let _ = http_answer(None, &answer);
    }
}
