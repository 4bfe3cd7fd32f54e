//! Qdiscs and tc filters.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcAttribute, TcBpfFlags, TcFilterBpfOption, TcFilterFlowerOption,
    TcFilterMatchAllOption, TcFilterU32Option, TcHandle, TcMessage, TcOption,
};

use super::Netlink;

/// Protocol of a filter that sees all packets, in host byte order.
pub const ETH_P_ALL: u16 = 0x0003;

/// The qdisc that carries ingress filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qdisc {
    Clsact,
    /// The older qdisc, for ingress only; it takes the same filters.
    Ingress,
}

/// A tc filter.
#[derive(Clone, Debug)]
pub struct Filter {
    pub chain: u32,
    pub priority: u16,
    /// Protocol, like `ETH_P_ALL`.
    pub protocol: u16,
    pub handle: u32,
    /// Kind, like `bpf` or `flower`.
    pub kind: String,
    pub program: Option<FilterProgram>,
    /// Direct action: the program's result is the verdict.
    pub direct: bool,
    /// Verdict of its own actions for a packet that matches (`TC_ACT_OK` and the like); `None` if it
    /// has no action with a fixed verdict.
    pub action: Option<i32>,
}

/// The program of a filter of kind `bpf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterProgram {
    pub id: u32,
    pub name: String,
    pub tag: [u8; 8],
}

/// Direction of the packets that a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Ingress,
    Egress,
}

impl Netlink {
    /// Returns the qdiscs that carry ingress filters, each with the index of its interface.
    pub async fn qdiscs(&self) -> io::Result<Vec<(u32, Qdisc)>> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.dump(request, |reply| match reply {
            RouteNetlinkMessage::NewQueueDiscipline(message) => {
                let qdisc = match kind(&message)? {
                    "clsact" => Qdisc::Clsact,
                    "ingress" => Qdisc::Ingress,
                    _ => return None,
                };
                Some((message.header.index as u32, qdisc))
            }
            _ => None,
        })
        .await
    }

    /// Adds a clsact to an interface.
    pub async fn add_clsact(&self, ifindex: u32) -> io::Result<()> {
        let request = RouteNetlinkMessage::NewQueueDiscipline(clsact(ifindex));
        self.request(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL).await.map(drop)
    }

    /// Removes the clsact with every filter on it.
    pub async fn delete_clsact(&self, ifindex: u32) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelQueueDiscipline(clsact(ifindex));
        self.request(request, NLM_F_ACK).await.map(drop)
    }

    /// Returns the filters of an interface that has a clsact or ingress qdisc, in no order.
    pub async fn filters(&self, ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
        let message = filter_message(ifindex, direction);
        self.dump(RouteNetlinkMessage::GetTrafficFilter(message), |reply| match reply {
            RouteNetlinkMessage::NewTrafficFilter(message) => filter(&message),
            _ => None,
        })
        .await
    }

    /// Attaches a direct-action program on ingress. With `replace` it replaces the filter there atomically;
    /// without, an existing filter is an error.
    pub async fn set_filter(
        &self,
        ifindex: u32,
        priority: u16,
        handle: u32,
        name: &str,
        program: BorrowedFd<'_>,
        replace: bool,
    ) -> io::Result<()> {
        let mut message = our_filter(ifindex, priority, handle);
        message.attributes.push(TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
            TcOption::Bpf(TcFilterBpfOption::ProgName(name.into())),
            TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
        ]));
        let flags = NLM_F_ACK | NLM_F_CREATE | if replace { 0 } else { NLM_F_EXCL };
        self.request(RouteNetlinkMessage::NewTrafficFilter(message), flags).await.map(drop)
    }

    /// Removes one ingress filter.
    pub async fn delete_filter(&self, ifindex: u32, priority: u16, handle: u32) -> io::Result<()> {
        let message = our_filter(ifindex, priority, handle);
        self.request(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK).await.map(drop)
    }
}

fn clsact(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

fn filter_message(ifindex: u32, direction: Direction) -> TcMessage {
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    let mut message = TcMessage::with_index(ifindex as i32);
    message.header.parent = TcHandle { major: u16::MAX, minor };
    message
}

fn our_filter(ifindex: u32, priority: u16, handle: u32) -> TcMessage {
    let mut message = filter_message(ifindex, Direction::Ingress);
    message.header.info = u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be());
    message.header.handle = handle.into();
    message.attributes.push(TcAttribute::Kind("bpf".into()));
    message
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    })
}

/// Parses a filter; `None` for the head of each priority, which the kernel lists with handle 0.
fn filter(message: &TcMessage) -> Option<Filter> {
    let handle = u32::from(message.header.handle);
    if handle == 0 {
        return None;
    }
    let mut program = FilterProgram { id: 0, name: String::new(), tag: [0; 8] };
    let (mut chain, mut direct, mut action) = (0, false, None);
    for attribute in &message.attributes {
        let options = match attribute {
            TcAttribute::Options(options) => options,
            TcAttribute::Chain(number) => {
                chain = *number;
                continue;
            }
            _ => continue,
        };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => program.id = *id,
                TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => program.name = name.clone(),
                TcOption::Bpf(TcFilterBpfOption::ProgTag(tag)) => program.tag = *tag,
                TcOption::Bpf(TcFilterBpfOption::Flags(flags)) => {
                    direct = flags.contains(TcBpfFlags::DirectAction);
                }
                TcOption::MatchAll(TcFilterMatchAllOption::Action(actions))
                | TcOption::U32(TcFilterU32Option::Action(actions))
                | TcOption::Flower(TcFilterFlowerOption::Actions(actions)) => {
                    action = actions.iter().find_map(decision);
                }
                _ => {}
            }
        }
    }
    Some(Filter {
        chain,
        priority: (message.header.info >> 16) as u16,
        protocol: u16::from_be(message.header.info as u16),
        handle,
        kind: kind(message)?.into(),
        program: (program.id != 0).then_some(program),
        direct,
        action,
    })
}

/// Returns an action's verdict; `None` if it passes to the next action or is not fixed.
fn decision(action: &TcAction) -> Option<i32> {
    /// `TCA_GACT_PARMS`; `TCA_MIRRED_PARMS` and others have the same number.
    const PARAMETERS: u16 = 2;
    const PIPE: i32 = 3;
    action.attributes.iter().find_map(|attribute| {
        let TcActionAttribute::Options(options) = attribute else { return None };
        let parameters = options.iter().find(|option| option.kind() == PARAMETERS)?;
        let mut bytes = vec![0; parameters.value_len()];
        parameters.emit_value(&mut bytes);
        // struct tc_gen: index, capabilities, action
        let decision = i32::from_ne_bytes(bytes.get(8..12)?.try_into().ok()?);
        (decision != PIPE).then_some(decision)
    })
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::tc::{TcAction, TcActionAttribute, TcActionOption};

    use super::decision;

    /// Returns an action with these words as parameters.
    fn action(kind: u16, words: &[i32]) -> TcAction {
        let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let option = TcActionOption::Other(DefaultNla::new(kind, bytes));
        let mut action = TcAction::default();
        action.attributes =
            vec![TcActionAttribute::Kind("gact".into()), TcActionAttribute::Options(vec![option])];
        action
    }

    #[test]
    fn what_actions_decide() {
        // struct tc_gen: index, capabilities, action, reference count
        assert_eq!(decision(&action(2, &[1, 0, 0, 1, 1])), Some(0));
        assert_eq!(decision(&action(2, &[1, 0, -1, 1, 1])), Some(-1));
        assert_eq!(decision(&action(2, &[1, 0, 3, 1, 1])), None);
        assert_eq!(decision(&action(2, &[1, 0])), None);
        assert_eq!(decision(&action(7, &[1, 0, 0])), None);
    }
}
