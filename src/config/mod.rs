//! A configuration file: text in, [`Config`] or [`Diagnostic`]s out. Pure.
//!
//! ```text
//! text ── document ──> Node ── decode ──> rules ── check ──> Config
//!                                └──────────┴──> Problems ── document ──> Diagnostics
//! ```
//!
//! `document` reads by `yaml` and `toml`; `vocabulary` holds the words, `scalar`, `host` and `network`
//! judge single values, and `schema` describes the whole.

mod check;
mod decode;
mod diagnostic;
mod document;
mod hint;
mod host;
mod network;
mod node;
mod path;
mod quote;
mod reference;
mod scalar;
mod schema;
mod toml;
mod types;
mod vocabulary;
mod yaml;

use diagnostic::{Complaint, Problem, Problems};
use document::Document;
use node::Node;

pub use check::{KEY_ENTRIES, RECEIVERS, UPSTREAMS};
pub use diagnostic::{Diagnostic, Related, Severity};
pub use hint::nearest;
pub use host::{Address, Family, Host, KeyAddress, upstream_refusal, with_port};
pub use network::Network;
pub use path::Path;
pub use reference::{MARKS, manual, markdown};
pub use schema::schema;
pub use types::{
    Action, Addresses, Admission, Fragments, Hash, Health, Key, Mode, Payload, Ports, Rule, Source,
    State, Strategy, Upstream,
};
use vocabulary::INTERFACES;
pub use vocabulary::{ANY, STATSD};

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file's own; the command line may replace them. May be empty.
    pub interfaces: Vec<String>,
    pub rules: Vec<Rule>,
    /// What is probably not meant.
    pub warnings: Vec<Diagnostic>,
    document: Document,
}

impl Config {
    /// Reads and judges a file's text. Neither file nor network is touched.
    ///
    /// `name` is for the messages, and says the format: TOML if it ends in `.toml`, else YAML, which
    /// JSON is too.
    ///
    /// # Errors
    ///
    /// All that is wrong, in the file's order: at most 20 errors, and one more that counts the rest.
    pub fn parse(name: &str, text: &str) -> Result<Config, Vec<Diagnostic>> {
        let document = Document::new(name, text);
        let node = document.read()?;
        let mut decoded = decode::decode(&node);
        check::check(&mut decoded);
        if !decoded.problems.is_empty() {
            let locate =
                |problems: &[Problem]| document.diagnose(Severity::Error, problems, Some(&node));
            return Err(decoded.problems.diagnose(locate));
        }
        let warnings = diagnose(Severity::Warning, decoded.warnings, &document, Some(&node));
        drop(node);
        let (interfaces, rules) = (decoded.interfaces, decoded.rules);
        Ok(Config { interfaces, rules, warnings, document })
    }

    /// The host with this index among the destinations of the rule with that one.
    pub fn destination(&self, (rule, host): (usize, usize)) -> &Upstream {
        let rule = &self.rules[rule];
        rule.upstreams.get(host).unwrap_or_else(|| &rule.mirrors[host - rule.upstreams.len()])
    }

    /// The place of an interface's name.
    pub fn interface(&self, name: &str) -> Path {
        let nth = self.interfaces.iter().position(|it| it == name);
        Path::default().field(INTERFACES.name).index(nth.unwrap_or_default())
    }

    /// Errors of a later stage, each with its place in the file; of very many the first few and
    /// a count. Costs one pass over the file's text.
    pub fn errors(&self, findings: Vec<Finding>) -> Vec<Diagnostic> {
        diagnose(Severity::Error, findings, &self.document, None)
    }

    /// Like [`Config::errors`].
    pub fn warnings(&self, findings: Vec<Finding>) -> Vec<Diagnostic> {
        diagnose(Severity::Warning, findings, &self.document, None)
    }

    /// Line and column of each place, counted from 1.
    pub fn locate(&self, places: &[Path]) -> Vec<(usize, usize)> {
        let at = |path: &Path| Problem {
            at: path.clone().into(),
            complaint: Complaint::new(""),
            related: None,
        };
        let problems: Vec<Problem> = places.iter().map(at).collect();
        let found = self.document.diagnose(Severity::Error, &problems, None);
        found.into_iter().map(|found| (found.line, found.column)).collect()
    }
}

fn diagnose(
    severity: Severity,
    findings: Vec<Finding>,
    document: &Document,
    node: Option<&Node<'_>>,
) -> Vec<Diagnostic> {
    if findings.is_empty() {
        return Vec::new();
    }
    let mut problems = Problems::default();
    for finding in findings {
        problems.push(finding.at, Complaint::new(finding.message));
    }
    problems.diagnose(|problems| document.diagnose(severity, problems, node))
}

/// What a later stage has to say about a place in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub at: Path,
    pub message: String,
}

impl Finding {
    pub fn new(at: &Path, message: impl Into<String>) -> Finding {
        Finding { at: at.clone(), message: message.into() }
    }
}
