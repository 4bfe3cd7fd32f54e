//! Programs and filters that run before udplb on an interface.

use anyhow::Context;
use libbpf_rs::ProgramHandle;

use crate::bpf::tcx::Attached;
use crate::datapath::hook::Attachment;
use crate::datapath::tc;
use crate::datapath::xdp::Slot;
use crate::error::Result;
use crate::net::Netlink;
use crate::net::link::Link;
use crate::net::qdisc::{Direction, ETH_P_ALL, Filter};
use crate::reconcile::observe::Interface;

/// A program or filter that runs before udplb's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    /// Kind and name, like `XDP program 12 filter_udp`.
    pub name: String,
    /// Command that removes it.
    pub remove: String,
    /// True if no packet passes it.
    pub takes_all: bool,
}

/// Returns them in the order in which they run.
pub async fn read(
    netlink: &Netlink,
    link: &Link,
    seen: &Interface,
    protocols: &[u16],
) -> Result<Vec<Before>> {
    let hook = &seen.hook;
    let is_other = matches!(seen.xdp, Slot::Other(_));
    let mut before: Vec<Before> = xdp(link).filter(|_| is_other).collect();
    before.extend(hook.earlier.iter().map(|program| tcx(link, program)));
    if hook.present() == Some(Attachment::Link) {
        return Ok(before);
    }
    let mut filters = netlink.filters(link.index, Direction::Ingress).await.context("filters")?;
    filters.sort_by_key(|filter| (filter.priority, filter.handle));
    let is_first = |filter: &&Filter| {
        filter.chain == 0
            && filter.priority < tc::PRIORITY
            && (filter.protocol == ETH_P_ALL || protocols.contains(&filter.protocol))
    };
    before.extend(filters.iter().filter(is_first).map(|it| filter(link, it)));
    Ok(before)
}

fn filter(link: &Link, filter: &Filter) -> Before {
    const NEXT: i32 = -1;
    Before {
        name: format!("tc filter {}", tc::describe(filter)),
        remove: format!(
            "tc filter del dev {} ingress pref {} handle {:#x} {}",
            link.name, filter.priority, filter.handle, filter.kind
        ),
        takes_all: filter.kind == "matchall" && filter.action.is_some_and(|it| it != NEXT),
    }
}

fn xdp(link: &Link) -> impl Iterator<Item = Before> {
    link.xdp.iter().map(|(mode, id)| Before {
        name: format!("XDP program {}", name(*id)),
        remove: format!("ip link set dev {} {mode} off", link.name),
        takes_all: false,
    })
}

/// A tcx program runs before all filters.
fn tcx(link: &Link, attached: &Attached) -> Before {
    Before {
        name: format!("tcx program {}", name(attached.program)),
        remove: match attached.link {
            0 => format!("bpftool net detach tcx_ingress dev {}", link.name),
            id => format!("bpftool link detach id {id}"),
        },
        takes_all: false,
    }
}

/// Returns id and name of a program; the name needs CAP_SYS_ADMIN.
fn name(id: u32) -> String {
    let program = ProgramHandle::from_prog_id(id);
    program.map_or_else(|_| id.to_string(), |it| format!("{id} {}", it.name().display()))
}
