//! A configuration file: text in, [`Config`] or [`Diagnostic`]s out. Pure.
//!
//! ```text
//! text ── document ──> Node ── decode ──> rules ── check ──> Config
//!                                └──────────┴──> Message ─── document ──> Diagnostics
//! ```
//!
//! `document` reads with `yaml` and `toml`; `vocabulary` holds the words, which `schema` and `reference`
//! describe; `scalar`, `host` and `network` check single values, `health` has the probes.

mod check;
mod decode;
mod diagnostic;
mod document;
pub mod health;
mod hint;
mod host;
mod network;
mod node;
mod path;
mod period;
mod quote;
mod reference;
pub mod samplicator;
mod scalar;
mod schema;
mod toml;
mod types;
mod vocabulary;
mod yaml;

use std::collections::BTreeMap;

use decode::Decoded;
use diagnostic::Diagnostics;
use document::Document;
use node::Node;

pub use check::{KEY_ENTRIES, RECEIVERS, UPSTREAMS};
pub use diagnostic::{Diagnostic, Message, Related, Severity};
pub use health::{AllDown, Check, Health, Probe};
pub use hint::nearest;
pub use host::{Address, Family, Host, KeyAddress, upstream_refusal, with_port};
pub use network::{Network, deciding};
pub use path::Path;
pub use period::Period;
pub use reference::{MARKS, manual, markdown};
pub use schema::schema;
pub use types::{
    Action, Addresses, Admission, Announce, Decap, Flows, Fragments, Hash, Key, Mode, Payload,
    Ports, Reply, RuleConfig, ServerId, ServerIdPlace, Source, State, Strategy, StrategyPart,
    StrategyParts, Templates, UpstreamConfig, Via, Xdp,
};
pub use vocabulary::ANY;
use vocabulary::INTERFACES;

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file's own; the command line may replace them. May be empty.
    pub interfaces: Vec<String>,
    pub announce: Option<Announce>,
    /// XDP modes other than `off`, by interface.
    pub xdp: BTreeMap<String, Xdp>,
    pub flows: Flows,
    pub decap: Option<Decap>,
    pub rules: Vec<RuleConfig>,
    /// Valid, but probably not intended.
    pub warnings: Vec<Diagnostic>,
    document: Document,
}

impl Config {
    /// Reads and checks a file's text. Neither file nor network is touched.
    ///
    /// `name` is shown in messages and selects the format: TOML if it ends in `.toml`, else YAML, which
    /// includes JSON.
    ///
    /// # Errors
    ///
    /// Returns all errors in the file's order: at most 20, and one more that counts the rest.
    pub fn parse(name: &str, text: &str) -> Result<Config, Vec<Diagnostic>> {
        let document = Document::new(name, text);
        let node = document.read()?;
        let mut decoded = decode::decode(&node);
        check::check(&mut decoded);
        if !decoded.diagnostics.is_empty() {
            let errors = decoded.diagnostics;
            return Err(errors.diagnose(|it| document.diagnose(Severity::Error, it, Some(&node))));
        }
        let warnings = diagnose(Severity::Warning, decoded.warnings, &document, Some(&node));
        drop(node);
        let Decoded { interfaces, xdp, announce, flows, decap, rules, .. } = decoded;
        Ok(Config { interfaces, xdp, announce, flows, decap, rules, warnings, document })
    }

    /// Returns the host with an index among the destinations of a rule.
    pub fn destination(&self, (rule, host): (usize, usize)) -> &UpstreamConfig {
        let rule = &self.rules[rule];
        rule.upstreams.get(host).unwrap_or_else(|| &rule.mirrors[host - rule.upstreams.len()])
    }

    /// Returns the place of an interface's name.
    pub fn interface(&self, name: &str) -> Path {
        let nth = self.interfaces.iter().position(|it| it == name);
        Path::default().field(INTERFACES.name).index(nth.unwrap_or_default())
    }

    /// Locates errors of a later stage in the file; returns the first of very many and a count. Costs one
    /// pass over the file's text.
    pub fn errors(&self, diagnostics: Vec<Message>) -> Vec<Diagnostic> {
        diagnose(Severity::Error, diagnostics, &self.document, None)
    }

    /// Like [`Config::errors`].
    pub fn warnings(&self, diagnostics: Vec<Message>) -> Vec<Diagnostic> {
        diagnose(Severity::Warning, diagnostics, &self.document, None)
    }

    /// Returns line and column of each place, counted from 1.
    pub fn locate(&self, places: &[Path]) -> Vec<(usize, usize)> {
        let at = places.iter().map(|path| Message::about(path, ""));
        let found = self.document.diagnose(Severity::Error, &Vec::from_iter(at), None);
        found.into_iter().map(|found| (found.line, found.column)).collect()
    }
}

fn diagnose(
    severity: Severity,
    diagnostics: Vec<Message>,
    document: &Document,
    node: Option<&Node<'_>>,
) -> Vec<Diagnostic> {
    if diagnostics.is_empty() {
        return Vec::new();
    }
    let mut all = Diagnostics::default();
    diagnostics.into_iter().for_each(|diagnostic| all.push(diagnostic));
    all.diagnose(|diagnostics| document.diagnose(severity, diagnostics, node))
}
