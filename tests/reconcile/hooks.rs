//! The ingress hook: tcx links and tc filters, and moves between the two.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use udplb::bpf::tcx;

use crate::common::lab::{Lab, Outcome, to_port};
use crate::common::service::{Arpd, until};
use crate::common::tun::Tun;
use crate::expect_way;
use crate::lifecycle::{add_filter, has_clsact, lose_nothing, on, under_load};

/// Creates a lab whose udplb attaches by links; `None` before Linux 6.6.
fn lab_with_links() -> Option<Lab> {
    let lab = Lab::new();
    lab.has_links().then_some(lab)
}

/// Returns the names of the programs on an interface: those at tcx, then those of tc filters.
fn programs(lab: &Lab, interface: &str) -> Vec<String> {
    let first = |text: &str| text.split(' ').next().unwrap_or_default().to_string();
    let links = lab.links(interface);
    let filters = lab.relay.tc(&format!("filter show dev {interface} ingress"));
    let named = filters.lines().filter_map(|line| line.split_once(" handle 0x7564 "));
    links.iter().map(|link| first(link)).chain(named.map(|(_, rest)| first(rest))).collect()
}

/// A filter of somebody else that runs before our priority and lets every packet go on.
const EARLIER: &str = "ingress pref 50 bpf da bytecode 1,6 0 0 4294967295";

#[test]
fn link_needs_no_clsact() {
    let Some(lab) = lab_with_links() else { return };
    lab.apply(&to_port(7001));
    expect_way(&lab, 7001);
    assert!(!has_clsact(&lab, "eth0"));
    assert_eq!(programs(&lab, "eth0"), ["udplb"]);
    assert!(lab.bpffs.pins().join(format!("links/{}", lab.relay.index("eth0"))).exists());
    lab.run("detach").expect(0);
    assert!(programs(&lab, "eth0").is_empty());
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    lab.run("detach --purge").expect(0);
    assert!(lab.links("eth0").is_empty() && !lab.bpffs.pins().exists());
}

/// A filter that ran before ours still does, and a filter behind ours is no obstacle.
#[test]
fn earlier_filter_stays_first() {
    let Some(lab) = lab_with_links() else { return };
    lab.relay.tc("qdisc add dev eth0 clsact");
    assert!(add_filter(&lab, "eth0", EARLIER));
    lab.apply(&to_port(7001));
    assert!(lab.links("eth0").is_empty());
    lab.relay.tc("filter del dev eth0 ingress pref 50");
    let plan = lab.run(&format!("plan {}", lab.write(&to_port(7001)).display())).expect(0);
    assert!(plan.stdout.contains("renewed"));
    assert_eq!(lab.apply(&to_port(7001))["changed"], true);
    assert_eq!(programs(&lab, "eth0"), ["udplb"]);
    assert_eq!(lab.links("eth0").len(), 1);
    let same = "ingress pref 100 protocol ip bpf da bytecode 1,6 0 0 4294967295";
    assert!(add_filter(&lab, "eth0", same));
    assert_eq!(lab.apply(&to_port(7001))["changed"], false);
    expect_way(&lab, 7001);
    lab.run("status").expect(0);
}

/// An upgrade from a udplb or kernel without tcx, and moves back and forth, each with traffic.
#[test]
fn move_between_filter_and_link_loses_and_doubles_nothing() {
    let Some(mut lab) = lab_with_links() else { return };
    lab.hide_tcx(true);
    lab.apply(&under_load(7001));
    lab.hide_tcx(false);
    assert_eq!(programs(&lab, "eth0"), ["udplb"]);
    assert!(lab.links("eth0").is_empty());
    assert!(add_filter(&lab, "eth0", EARLIER));
    let config = |round: u16| under_load(7001 + round / 2 % 2);
    lose_nothing(&lab, || {
        for round in 0..24 {
            match round % 2 {
                0 => _ = lab.relay.tc("filter del dev eth0 ingress pref 50"),
                _ => assert!(add_filter(&lab, "eth0", EARLIER)),
            }
            assert_eq!(lab.apply(&config(round))["changed"], true);
            assert_eq!(lab.links("eth0").len(), usize::from(round % 2 == 0), "{round}");
            assert_eq!(lab.apply(&config(round))["changed"], false);
            lab.run("status").expect(0);
        }
    });
    lab.run("detach --purge").expect(0);
    assert!(programs(&lab, "eth0").is_empty());
}

/// The process is killed at each step of a move in turn.
#[test]
fn killed_move_is_completed() {
    let Some(lab) = lab_with_links() else { return };
    lab.relay.tc("qdisc add dev eth0 clsact");
    assert!(add_filter(&lab, "eth0", EARLIER));
    lab.apply(&under_load(7001));
    let mut killed = 0;
    lose_nothing(&lab, || {
        for call in ["membarrier", "bpf", "sendto"] {
            let mut at = 1;
            loop {
                for earlier in [false, true] {
                    match earlier {
                        false => _ = lab.relay.tc("filter del dev eth0 ingress pref 50"),
                        true => assert!(add_filter(&lab, "eth0", EARLIER)),
                    }
                    let was_killed = apply_killed(&lab, call, at);
                    killed += usize::from(was_killed);
                    lab.apply(&under_load(7001));
                    assert_eq!(programs(&lab, "eth0"), ["udplb"], "{call} {at}");
                    assert_eq!(lab.links("eth0").is_empty(), earlier, "{call} {at}");
                    assert_eq!(lab.apply(&under_load(7001))["changed"], false, "{call} {at}");
                    lab.run("status").expect(0);
                }
                // most calls of these kinds read what is applied
                at += if call == "bpf" { 11 } else { 1 };
                if at > if call == "bpf" { 300 } else { 6 } {
                    break;
                }
            }
        }
    });
    assert!(killed > 10, "only {killed} were killed");
    assert!(handovers(&lab).is_empty(), "{:?}", handovers(&lab));
}

/// Applies, and is killed at the nth system call of a kind; returns false if there was none.
fn apply_killed(lab: &Lab, call: &str, nth: usize) -> bool {
    let mut command = lab.relay.command("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e"]);
    command.arg(format!("inject={call}:signal=KILL:when={nth}"));
    command.args([env!("CARGO_BIN_EXE_udplb"), "--pin-dir"]).arg(lab.bpffs.pins());
    Outcome::of(command.arg("apply").arg(lab.write(&under_load(7001)))).code != Some(0)
}

/// Returns the pins of handovers in all generations.
fn handovers(lab: &Lab) -> Vec<String> {
    let generations = fs::read_dir(lab.bpffs.pins().join("generations")).expect("generations");
    let pins = generations.flat_map(|it| fs::read_dir(it.expect("a generation").path()));
    let names = pins.flatten().map(|pin| pin.expect("a pin").file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("handover")).collect()
}

/// Attaches a program of somebody else at tcx.
fn attach_foreign(lab: &Lab) -> OwnedFd {
    let program = crate::common::returning(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, c"foreign", -1);
    let index = lab.relay.index("eth0");
    lab.relay.enter(|| tcx::attach(program.as_fd(), index)).expect("attached")
}

#[test]
fn foreign_programs_keep_their_places() {
    let Some(lab) = lab_with_links() else { return };
    let _before = attach_foreign(&lab);
    lab.apply(&to_port(7001));
    let _after = attach_foreign(&lab);
    let order = ["foreign", "udplb", "foreign"];
    assert_eq!(programs(&lab, "eth0"), order);
    lab.apply(&to_port(7002));
    expect_way(&lab, 7002);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    assert_eq!(programs(&lab, "eth0"), order);
    // only what runs before may hide packets
    let doctor = lab.run("doctor").expect(3).stdout;
    assert_eq!(doctor.matches("tcx program").count(), 1, "{doctor}");
    assert!(doctor.contains("fix:  bpftool link detach id "), "{doctor}");
    lab.run("detach --purge").expect(0);
    assert_eq!(programs(&lab, "eth0"), ["foreign", "foreign"]);
}

#[test]
fn lost_link_is_put_back_by_arpd() {
    let Some(lab) = lab_with_links() else { return };
    lab.apply(&to_port(7001));
    let arpd = Arpd::start(&lab, "");
    let pin = lab.bpffs.pins().join(format!("links/{}", lab.relay.index("eth0")));
    let lose: [&dyn Fn(); 2] =
        [&|| lab.take_off("eth0"), &|| fs::remove_file(&pin).expect("a pin")];
    for (count, lose) in lose.iter().enumerate() {
        let before = lab.links("eth0");
        lose();
        until("it is put back", || lab.links("eth0").len() == 1 && lab.links("eth0") != before);
        until("it is counted", || lab.status()["interfaces"][0]["reattached"] == count + 1);
        expect_way(&lab, 7001);
        lab.run("status").expect(0);
    }
    assert!(arpd.log().contains("eth0: udplb's filter was gone, and no detach took it"));
    lab.run("detach").expect(0);
    std::thread::sleep(std::time::Duration::from_secs(2));
    assert!(lab.links("eth0").is_empty());
}

#[test]
fn detached_link_is_noticed_and_healed() {
    for lab in Lab::for_each_attachment() {
        lab.apply(&to_port(7001));
        lab.take_off("eth0");
        let status = lab.run("status").expect(3);
        assert!(status.stdout.contains("eth0: udplb is not attached"), "{status:?}");
        assert_eq!(lab.apply(&to_port(7001))["changed"], true);
        expect_way(&lab, 7001);
    }
}

/// All pins go while a process has the link open: the link is another udplb's, for all that can be seen.
#[test]
fn link_without_pins_is_an_orphan() {
    let Some(lab) = lab_with_links() else { return };
    lab.apply(&to_port(7001));
    let pin = lab.bpffs.pins().join(format!("links/{}", lab.relay.index("eth0")));
    let _link = tcx::open(&pin).expect("a link");
    fs::remove_dir_all(lab.bpffs.pins()).expect("pins");
    lab.run("status").expect(3);
    let by_hand = "bpftool link detach id";
    lab.run("detach").expect(1).says(&["eth0", "not in this pin directory", by_hand]);
    lab.try_apply(&to_port(7002), "").expect(1).says(&["tcx link", "udplb", "--force"]);
    expect_way(&lab, 7001);
    lab.try_apply(&to_port(7002), "--force").expect(0);
    expect_way(&lab, 7002);
    assert!(pin.exists());
    assert_eq!(lab.links("eth0").len(), 1);
    assert_eq!(lab.apply(&to_port(7002))["changed"], false);
}

/// A pin of the link alone is lost while another holds it: the next swap pins it again.
#[test]
fn link_that_is_held_elsewhere_is_pinned_again() {
    let Some(lab) = lab_with_links() else { return };
    lab.apply(&to_port(7001));
    let pin = lab.bpffs.pins().join(format!("links/{}", lab.relay.index("eth0")));
    let _link = tcx::open(&pin).expect("a link");
    fs::remove_file(&pin).expect("a pin");
    lab.apply(&to_port(7002));
    expect_way(&lab, 7002);
    assert!(pin.exists());
    assert_eq!(lab.links("eth0").len(), 1);
}

/// A link goes with its interface into another network namespace, where nobody would swap it.
#[test]
fn moved_interface_loses_its_link() {
    let Some(lab) = lab_with_links() else { return };
    lab.apply(&on(&["eth0", "up0"], to_port(7001)));
    lab.relay.ip(&format!("link set up0 netns {} name moved0", lab.client.name));
    lab.run("status").expect(3);
    lab.relay.link("up0", &lab.upstream, "eth1", true);
    lab.relay.ip("addr add 10.2.0.1/24 dev up0");
    lab.upstream.ip("addr add 10.2.0.20/24 dev eth1");
    lab.apply(&on(&["eth0", "up0"], to_port(7002)));
    lab.run("status").expect(0);
    expect_way(&lab, 7002);
    let index = lab.client.index("moved0");
    let left = lab.client.enter(|| tcx::query(index)).expect("an answer").unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
    let links = fs::read_dir(lab.bpffs.pins().join("links")).expect("links").count();
    assert_eq!(links, 2);
}

/// A generation of a udplb that attached filters alone serves behind a link too.
#[test]
fn rollback_to_a_generation_of_filters_keeps_the_link() {
    let Some(mut lab) = lab_with_links() else { return };
    lab.hide_tcx(true);
    lab.apply(&to_port(7001));
    lab.hide_tcx(false);
    lab.apply(&to_port(7002));
    assert_eq!(lab.links("eth0").len(), 1);
    lab.run("rollback").expect(0);
    expect_way(&lab, 7001);
    assert_eq!((lab.links("eth0").len(), programs(&lab, "eth0").len()), (1, 1));
    // its clsact is still known to be udplb's
    lab.run("detach --purge").expect(0);
    assert!(!has_clsact(&lab, "eth0"));
}

#[test]
fn interfaces_without_ethernet_header_have_links() {
    let Some(mut lab) = lab_with_links() else { return };
    let _tun = Tun::new(&lab.relay, "tun0");
    lab.hide_tcx(true);
    lab.apply(&on(&["eth0", "tun0"], to_port(7001)));
    lab.hide_tcx(false);
    lab.apply(&on(&["eth0", "tun0"], to_port(7001)));
    assert_eq!(programs(&lab, "tun0"), ["udplb_l3"]);
    assert_eq!(lab.links("tun0").len(), 1);
    lab.run("status").expect(0);
    lab.run("detach --purge").expect(0);
    assert!(lab.links("tun0").is_empty());
}
