//! Cost of loading the program: instructions that the verifier processes, and load time.

use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::time::Instant;

use libbpf_rs::skel::OpenSkel;
use udplb::bpf::types;
use udplb::datapath::generation::open_for;

use crate::common::verifier::walked;
use crate::{Report, least};

const ROUNDS: usize = 10;

pub fn measure(report: &mut Report) {
    let plain = types::features { fragments: 1, errors: 1, ..Default::default() };
    let extras = types::extras { any_port: 1, senders: 1, payload: 1, ..Default::default() };
    let all = types::features { ipv6: 1, receivers: 1, extras, ..plain };
    let sets = [plain, types::features { ipv6: 1, ..plain }, all];
    let mut walked = [0; 3];
    let times: [f64; 3] = least(ROUNDS, |index| {
        let (time, instructions) = load(sets[index]);
        walked[index] = instructions;
        time
    });
    report.title("Loading the program; of that, instructions that the verifier walks");
    let names = ["block, IPv4", "block, IPv4 and IPv6", "everything"];
    for ((what, time), walked) in names.iter().zip(times).zip(walked) {
        report.note(what, &format!("{walked:>9} {time:>7.1} ms"));
    }
}

/// Returns the time in milliseconds, and the number of instructions that the verifier processed.
fn load(features: types::features) -> (f64, u32) {
    let mut object = MaybeUninit::uninit();
    let mut skeleton = open_for(&features, &mut object).expect("the object opens");
    skeleton.progs.udplb_l3.set_autoload(false);
    skeleton.progs.udplb_heartbeat.set_autoload(false);
    let rodata = skeleton.maps.rodata_data.as_deref_mut().expect("the object has constants");
    rodata.features = types::features { ticks_per_second: 250, ..features };
    let started = Instant::now();
    let skeleton = skeleton.load().expect("the program loads");
    let took = started.elapsed();
    (took.as_secs_f64() * 1000.0, walked(skeleton.progs.udplb.as_fd()))
}
