//! Programs on the XDP hook: swaps, modes, rollback, and those of others.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use serde_json::{Value, json};
use udplb::bpf::xdp;

use crate::common::lab::{Lab, to_port};
use crate::common::service::until;
use crate::expect_way;

/// Returns the configuration of [`to_port`] with XDP of a mode on the relay's eth0.
fn config(port: u16, mode: &str) -> Value {
    let mut config = to_port(port);
    config["interfaces"] = json!([{ "name": "eth0", "xdp": mode }]);
    config
}

/// Returns the mode of the XDP program on the relay's eth0 as `ip` names it, and the program's id.
fn shown(lab: &Lab) -> Option<(String, u32)> {
    let text = lab.relay.ip("link show dev eth0");
    let line = text.lines().find(|line| line.contains("prog/xdp"))?;
    let mode = text.split_whitespace().find(|word| ["xdp", "xdpgeneric"].contains(word))?;
    let id = line.split_whitespace().skip_while(|word| *word != "id").nth(1)?;
    Some((mode.into(), id.parse().expect("an id")))
}

#[test]
fn mode_and_generation_change_in_place() {
    let lab = Lab::new();
    lab.apply(&config(7001, "generic"));
    let first = shown(&lab).expect("a program");
    assert_eq!(first.0, "xdpgeneric");
    assert_eq!(lab.apply(&config(7001, "generic"))["changed"], false);
    lab.apply(&config(7002, "generic"));
    let second = shown(&lab).expect("a program");
    assert_ne!(first.1, second.1);
    expect_way(&lab, 7002);
    lab.run("rollback").expect(0);
    assert_eq!(shown(&lab), Some(first), "the generation before");
    expect_way(&lab, 7001);
    lab.try_apply(&config(7001, "native"), "--force").expect(0);
    assert_eq!(shown(&lab).expect("a program").0, "xdp");
    lab.try_apply(&to_port(7003), "").expect(0);
    assert_eq!(shown(&lab), None);
    expect_way(&lab, 7003);
    lab.run("rollback").expect(0);
    assert_eq!(shown(&lab).expect("a program").0, "xdp");
    lab.run("detach").expect(0);
    assert_eq!(shown(&lab), None);
    lab.run("rollback").expect(0);
    assert_eq!(shown(&lab).expect("a program").0, "xdp");
    lab.run("detach --purge").expect(0);
    assert_eq!(shown(&lab), None);
    assert!(!lab.bpffs.pins().exists());
}

#[test]
fn lost_program_is_noticed_and_attached_again() {
    let lab = Lab::new();
    lab.apply(&config(7001, "generic"));
    let link = lab.bpffs.pins().join(format!("links/xdp-{}", lab.relay.index("eth0")));
    std::fs::remove_file(link).expect("a link");
    // the kernel frees it a moment later
    until("the link goes with its pin", || shown(&lab).is_none());
    expect_way(&lab, 7001);
    let status = lab.status();
    assert!(status["problems"].to_string().contains("XDP program is not attached"), "{status:#}");
    assert_eq!(lab.apply(&config(7001, "generic"))["changed"], true);
    assert!(shown(&lab).is_some());
}

/// Loads an XDP program that passes all packets.
fn stranger() -> OwnedFd {
    let pass = [[0xb7, 0, 0, 0, 2, 0, 0, 0], [0x95_u8, 0, 0, 0, 0, 0, 0, 0]];
    // SAFETY: the code and the C strings outlive the call, which returns a new descriptor or an error.
    unsafe {
        let fd = libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_XDP,
            c"stranger".as_ptr(),
            c"GPL".as_ptr(),
            pass.as_ptr().cast(),
            pass.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        );
        assert!(fd >= 0, "{}", std::io::Error::from_raw_os_error(-fd));
        OwnedFd::from_raw_fd(fd)
    }
}

#[test]
fn program_of_others_is_never_replaced() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let program = stranger();
    let index = lab.relay.index("eth0");
    let _link = lab.relay.enter(|| xdp::attach(program.as_fd(), index, true)).expect("a link");
    let before = shown(&lab).expect("the stranger");
    for options in ["", "--force"] {
        lab.try_apply(&config(7002, "generic"), options).expect(1).says(&["stranger", "xdp off"]);
    }
    assert_eq!(shown(&lab), Some(before));
    expect_way(&lab, 7001);
    let doctor = lab.run("doctor");
    assert!(doctor.stdout.contains("stranger"), "{doctor:?}");
}

#[test]
fn own_program_is_no_stranger_to_doctor() {
    let lab = Lab::new();
    lab.apply(&config(7001, "native"));
    let doctor = lab.run("doctor");
    assert!(!doctor.stdout.contains("udplb_xdp"), "{doctor:?}");
}

#[test]
fn plan_and_list_name_the_mode() {
    let lab = Lab::new();
    lab.apply(&to_port(7001));
    let file = lab.write(&config(7001, "generic"));
    let plan = lab.run(&format!("plan {}", file.display())).expect(0);
    assert_eq!(plan.stdout, "+ XDP on eth0: generic\n");
    lab.run(&format!("apply {}", file.display())).expect(0);
    let list = lab.run("list -o json").expect(0).json();
    assert_eq!(list["interfaces"], json!([{ "name": "eth0", "xdp": "generic" }]));
    let file = lab.write(&to_port(7001));
    let plan = lab.run(&format!("plan {}", file.display())).expect(0);
    assert_eq!(plan.stdout, "- XDP on eth0: generic\n");
}
