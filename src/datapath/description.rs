//! Description of a generation: its configuration, its ids and where it came from.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bpf;
use crate::config::Mode;
use crate::datapath::hook::Known;
use crate::desired::{Desired, RuleIds};
use crate::net::link::Layer;

/// Description of a generation, stored as JSON in its map `config`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Description {
    // first, so that it stands in the first chunk: see `made_of`
    #[serde(flatten)]
    pub origin: Origin,
    /// Version of the udplb that built it.
    pub version: String,
    /// SHA-256 of the object that it was loaded from.
    pub object: String,
    /// Seconds since 1970.
    pub built: u64,
    /// Inode of the network namespace: bpffs is shared between namespaces, filters are not.
    pub namespace: u64,
    /// The one for interfaces with an Ethernet header.
    pub program: ProgramName,
    /// The one for interfaces without, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program_l3: Option<ProgramName>,
    /// The one for interfaces with `xdp`, where there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub program_xdp: Option<ProgramName>,
    /// The interfaces whose clsact udplb made, so that it may take it away again.
    pub clsact: Vec<String>,
    /// The seed of its tables of keys.
    #[serde(default)]
    pub seed: u64,
    pub desired: Desired,
    /// In the order of the rules.
    pub ids: Vec<RuleIds>,
}

impl Description {
    /// The generation's programs at tc, and what they are for.
    pub fn programs(&self) -> impl Iterator<Item = (Layer, &ProgramName)> {
        let l3 = self.program_l3.as_ref().map(|name| (Layer::Ip, name));
        [(Layer::Ethernet, &self.program)].into_iter().chain(l3)
    }
}

/// Source of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Digest of the text and the arguments; empty if only a part of the text was applied.
    #[serde(default)]
    pub digest: String,
    /// The file; `-` is standard input.
    pub file: String,
    /// Interfaces of the command line, which replaced the file's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<String>,
}

/// Identifies a filter's program when its pin is gone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramName {
    pub id: u32,
    /// Hexadecimal.
    pub tag: String,
}

impl ProgramName {
    pub fn new(id: u32, tag: [u8; 8]) -> ProgramName {
        ProgramName { id, tag: tag.iter().map(|byte| format!("{byte:02x}")).collect() }
    }

    /// Returns the name of a loaded program.
    pub fn of(program: BorrowedFd<'_>) -> std::io::Result<ProgramName> {
        bpf::program_info(program).map(|info| ProgramName::new(info.id, info.tag))
    }
}

/// An existing generation.
#[derive(Clone, Debug)]
pub struct Generation {
    pub number: u32,
    pub description: Arc<Description>,
    /// Every pin exists, and the program uses these maps.
    pub intact: bool,
}

impl Generation {
    /// Returns the rules and their ids.
    pub fn hosts(&self) -> (&Desired, &[RuleIds]) {
        (&self.description.desired, &self.description.ids)
    }

    /// Returns the programs by their recorded names.
    pub fn programs(&self) -> impl Iterator<Item = Known> {
        let names = self.description.programs().map(|(_, name)| name.clone());
        names.map(|name| Known { generation: self.number, name, handover: false })
    }

    /// Returns all ids in use.
    pub fn ids(&self) -> impl Iterator<Item = u32> {
        all(&self.description.ids)
    }

    /// Returns the ids of all upstreams and mirrors, then those of answers, in the order of the generation's map;
    /// an id may occur twice.
    pub fn destinations(&self) -> impl Iterator<Item = u32> {
        let rules = &self.description.ids;
        let answers = rules.iter().flat_map(|ids| ids.answers.iter().copied());
        rules.iter().flat_map(RuleIds::destinations).chain(answers)
    }

    /// Returns each rule's id and the ids of the upstreams that count packets of the rule. Receivers of a
    /// replicating rule count copies instead and are left out.
    pub fn counting(&self) -> impl Iterator<Item = (u32, &[u32])> {
        let (desired, ids) = self.hosts();
        desired.rules.iter().zip(ids).map(|(rule, ids)| match rule.mode {
            Mode::Balance => (ids.rule, &ids.upstreams[..]),
            Mode::Replicate => (ids.rule, &[][..]),
        })
    }
}

/// Returns every id in use.
pub fn all(ids: &[RuleIds]) -> impl Iterator<Item = u32> {
    ids.iter().flat_map(RuleIds::all)
}
