//! Description of a generation: its configuration, its ids and where it came from.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::bail;
use serde::{Deserialize, Serialize};

use crate::bpf;
use crate::config::Mode;
use crate::datapath::hook::Known;
use crate::datapath::packed;
use crate::desired::{Desired, RuleIds};
use crate::net::link::Layer;

/// Description of a generation, stored in its map `config`: JSON, a zero, and packed rules and ids.
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
    #[serde(with = "shared")]
    pub desired: Arc<Desired>,
    /// In the order of the rules. Earlier versions wrote them here.
    #[serde(default, skip_serializing)]
    pub ids: Vec<RuleIds>,
}

/// Reads and writes a value that is shared in memory.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Serialize, S: Serializer>(
        value: &Arc<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// First byte of packed rules; other layouts need another one. Zero: none, since the rules are in the JSON.
const PACKED: u8 = 1;

impl Description {
    /// Returns the description as it is stored; `packed` are its rules and ids.
    pub fn bytes(&self, packed: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.extend([0, PACKED]);
        bytes.extend(packed);
        Ok(bytes)
    }

    /// Reads a description as it is stored, with zeros behind it.
    ///
    /// # Errors
    /// It is none.
    pub fn read(bytes: &[u8]) -> anyhow::Result<Description> {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let mut description: Description = serde_json::from_slice(&bytes[..end])?;
        match bytes[end..] {
            // an earlier version's
            [] | [_] | [_, 0, ..] => {}
            [_, PACKED, ref packed @ ..] => {
                let (rules, ids) = packed::unpack(packed)?;
                Arc::make_mut(&mut description.desired).rules = rules;
                description.ids = ids;
            }
            [_, layout, ..] => bail!("a later udplb packed its rules, in layout {layout}"),
        }
        Ok(description)
    }

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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Description, packed};
    use crate::config::Key;
    use crate::desired::{Desired, Rule, RuleIds, Upstream};

    fn described() -> Description {
        let host = Upstream::new([10, 0, 9, 1], Some(53));
        let rule = Rule::new("dns", Key::new([10, 0, 0, 5], Vec::new()), vec![host]);
        let text = json!({
            "digest": "d", "file": "/etc/udplb.yaml", "version": "v", "object": "o", "built": 7,
            "namespace": 1, "program": { "id": 2, "tag": "" }, "clsact": [],
            "desired": { "interfaces": ["eth0"], "rules": [rule] },
            "ids": [{ "rule": 3, "upstreams": [4] }],
        });
        Description::read(text.to_string().as_bytes()).expect("a description")
    }

    #[test]
    fn earlier_descriptions_have_rules_in_json() {
        let Description { desired, ids, .. } = described();
        let Desired { rules, interfaces, .. } = &*desired;
        assert_eq!((rules[0].name.as_str(), interfaces[0].as_str()), ("dns", "eth0"));
        assert_eq!(ids, [RuleIds { rule: 3, upstreams: vec![4], ..RuleIds::default() }]);
    }

    #[test]
    fn descriptions_are_read_as_they_were() {
        let description = described();
        let packed = packed::pack(&description.desired.rules, &description.ids);
        let mut bytes = description.bytes(&packed.expect("packed rules")).expect("bytes");
        let start = r#"{"digest":"d""#;
        assert!(bytes.starts_with(start.as_bytes()), "made_of() looks for it there");
        bytes.resize(4096, 0);
        let read = Description::read(&bytes).expect("a description");
        assert_eq!((&read.desired, &read.ids), (&description.desired, &description.ids));
        assert_eq!(read.origin, description.origin);
        let end = bytes.iter().position(|byte| *byte == 0).expect("an end");
        bytes[end + 1] = 9;
        let error = Description::read(&bytes).expect_err("another layout").to_string();
        assert!(error.contains("later udplb") && error.contains("layout 9"), "{error}");
    }
}
