//! A configuration file, read and ready to be compared with the kernel.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{self, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use sha2::{Digest, Sha256};

use crate::config::{self, Config, Diagnostic, Host, Message};
use crate::datapath::description::Origin;
use crate::datapath::generation;
use crate::datapath::pins::ReadGuard;
use crate::desired::partial::{self, Known, Resolved};
use crate::desired::{Desired, dns};
use crate::error::{Failure, Result};
use crate::net::Netlink;
use crate::reconcile::addresses;
use crate::reconcile::observe::Observed;

/// The longest text of a configuration, in bytes.
pub const LONGEST: u64 = 64 << 20;

/// The name that stands for standard input.
pub const STANDARD_INPUT: &str = "-";

/// Returns true for a regular file, which any process can read again: no pipe and no descriptor.
pub fn is_kept(path: &Path) -> bool {
    let of_process = ["/dev", "/proc"].iter().any(|directory| path.starts_with(directory));
    !of_process && path.is_file()
}

/// Default time limit for resolving all host names together.
pub const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A configuration file and the interfaces to apply it to.
pub struct ConfigFile {
    pub file: PathBuf,
    /// Replace those of the file unless empty.
    pub interfaces: Vec<String>,
}

/// A file's text.
pub struct Text {
    /// The name in messages; [`STANDARD_INPUT`] for standard input.
    pub name: String,
    text: String,
}

impl Text {
    /// # Errors
    /// The file cannot be read, is longer than [`LONGEST`], or is not UTF-8.
    pub fn read(file: &Path) -> Result<Text> {
        let name = file.display().to_string();
        let unreadable = |what: String| Failure::Unreadable(format!("{name}: {what}"));
        let mut bytes = Vec::new();
        let read = if name == STANDARD_INPUT {
            io::stdin().lock().take(LONGEST + 1).read_to_end(&mut bytes)
        } else {
            File::open(file).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
        };
        read.map_err(|error| unreadable(error.to_string()))?;
        if bytes.len() as u64 > LONGEST {
            return Err(unreadable("longer than 64 MiB, the limit for configurations".into()));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.utf8_error().valid_up_to();
            let before = &error.as_bytes()[..valid];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            let wrong = error.as_bytes()[valid];
            unreadable(format!("not UTF-8 in line {line}: byte {wrong:#04x} at offset {valid}"))
        })?;
        Ok(Text { name, text })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn parse(&self) -> Result<Config> {
        Config::parse(&self.name, &self.text).map_err(Failure::Config)
    }

    fn origin(&self, target: &ConfigFile, digest: String) -> Origin {
        Origin { digest, file: self.place(), interfaces: target.interfaces.clone() }
    }

    /// Returns the absolute path; [`STANDARD_INPUT`] if a later command could not read it again.
    fn place(&self) -> String {
        match path::absolute(&self.name) {
            Ok(path) if is_kept(&path) => path.display().to_string(),
            _ => STANDARD_INPUT.into(),
        }
    }

    /// Digest of version, arguments, format and text. Equal digests yield equal desired states.
    pub fn digest(&self, target: &ConfigFile) -> String {
        let mut digest = Sha256::new();
        // The extension selects the format.
        let extension = Path::new(&self.name).extension().unwrap_or_default().to_string_lossy();
        let interfaces = target.interfaces.join(" ");
        for part in [env!("CARGO_PKG_VERSION"), &interfaces, &extension, &self.text] {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A valid configuration and its target.
pub struct Request<'a> {
    text: &'a Text,
    target: &'a ConfigFile,
    config: Config,
    interfaces: Vec<String>,
    /// Time limit for resolving host names.
    timeout: Duration,
}

impl<'a> Request<'a> {
    /// # Errors
    /// The text is no configuration, or there are no interfaces.
    pub fn new(text: &'a Text, target: &'a ConfigFile, timeout: Duration) -> Result<Request<'a>> {
        let config = text.parse()?;
        let interfaces = interfaces(text, target, &config)?;
        Ok(Request { text, target, config, interfaces, timeout })
    }

    /// Resolves the host names.
    async fn resolve(&self, observed: &Observed, netlink: &Netlink) -> Result<Resolved> {
        let serving = observed.serving().and_then(|number| observed.generations.get(&number));
        let serving = serving.map(|generation| generation.description.desired.as_ref());
        let written = Desired::written(&self.config, &self.interfaces);
        let names = dns::names(&written);
        if names.is_empty() {
            return Ok(Resolved { desired: written, ..Resolved::default() });
        }
        let answers = dns::ask(names, self.timeout).await;
        let own = addresses::own(netlink).await?;
        let shrunk = serving.map(|serving| serving.incomplete.shrunk.clone()).unwrap_or_default();
        let known = Known { answers: &answers, own: &own, serving, shrunk: &shrunk };
        Ok(partial::resolve(&written, &known))
    }

    /// Replaces alternative names of interfaces by the kernel's own.
    fn canonical(self, observed: &Observed) -> Request<'a> {
        let interfaces = self.interfaces.iter().map(|name| observed.canonical(name)).collect();
        let mut config = self.config;
        let xdp = config.xdp.iter().map(|(name, xdp)| (observed.canonical(name), *xdp));
        config.xdp = xdp.collect();
        Request { interfaces, config, ..self }
    }
}

/// A configuration that was loaded for the kernel.
pub struct Loaded {
    pub origin: Origin,
    /// `None` if the text was applied before and is not validated again.
    pub config: Option<Config>,
    pub desired: Arc<Desired>,
    pub warnings: Vec<Diagnostic>,
    /// Parts of the file that `desired` lacks.
    pub missing: Vec<Diagnostic>,
}

impl Loaded {
    fn new(Request { text, target, config, .. }: Request<'_>, resolved: Resolved) -> Loaded {
        let mut warnings = config.warnings.clone();
        warnings.extend(config.warnings(notes(&config, &resolved)));
        let origin = text.origin(target, text.digest(target));
        let desired = Arc::new(resolved.desired);
        Loaded { origin, config: Some(config), desired, warnings, missing: Vec::new() }
    }

    /// Sets the parts that depend on the current addresses of the interfaces.
    pub async fn expand(&mut self, netlink: &Netlink) -> Result<()> {
        if let Some(renewed) = addresses::renewed(netlink, &self.desired).await? {
            self.desired = Arc::new(renewed);
        }
        Ok(())
    }
}

/// Loads a configuration.
///
/// # Errors
/// A host name has no address that can be used.
pub async fn load(request: Request<'_>, observed: &Observed, netlink: &Netlink) -> Result<Loaded> {
    let request = request.canonical(observed);
    let resolved = request.resolve(observed, netlink).await?;
    let resolved = complete(&request.config, resolved)?;
    Ok(Loaded::new(request, resolved))
}

/// Loads a configuration without the interfaces and hosts that are missing now.
///
/// # Errors
/// All interfaces are missing, and a generation is active.
pub async fn load_partial(
    request: Request<'_>,
    observed: &Observed,
    netlink: &Netlink,
) -> Result<Loaded> {
    let request = request.canonical(observed);
    let Request { config, .. } = &request;
    let mut resolved = request.resolve(observed, netlink).await?;
    let desired = &mut resolved.desired;
    let is_missing = |name: &&String| !observed.interfaces.contains_key(*name);
    desired.incomplete.interfaces = desired.interfaces.iter().filter(is_missing).cloned().collect();
    let missing = &desired.incomplete.interfaces;
    // Otherwise a misspelt name would stop all rules.
    if missing.len() == desired.interfaces.len() && observed.attached().next().is_some() {
        let all = missing.join(", ");
        return Err(anyhow!("none of the interfaces is here: {all}").into());
    }
    let mut diagnostics = no_interfaces(config, request.target, missing);
    let spots: Vec<config::Path> =
        resolved.gaps.iter().map(|gap| config.destination(gap.spot).at.clone()).collect();
    let hosts = &mut desired.incomplete.hosts;
    for (host, place) in hosts.iter_mut().zip(config.locate(&spots)) {
        (host.line, host.column) = place;
    }
    let findings = hosts.iter().zip(&spots).map(|(host, at)| Message::about(at, host.message()));
    diagnostics.extend(config.errors(findings.collect()));
    Ok(Loaded { missing: diagnostics, ..Loaded::new(request, resolved) })
}

/// Returns the current generation's configuration if it was built from the same text without host
/// names; to validate 10,000 rules again takes several times as long as the rest.
pub fn load_cached(text: &Text, target: &ConfigFile, guard: &ReadGuard) -> Option<Loaded> {
    let digest = text.digest(target);
    let desired = generation::made_of(guard, guard.current()?, &digest)?;
    if !desired.incomplete.is_empty() {
        return None;
    }
    let named = desired.upstreams().any(|upstream| matches!(upstream.host, Host::Name(_)));
    let origin = text.origin(target, digest);
    let (warnings, missing) = (Vec::new(), Vec::new());
    (!named).then_some(Loaded { origin, config: None, desired, warnings, missing })
}

/// Resolves the host names of a configuration, for any host.
///
/// # Errors
/// A host name has no address that can be used.
pub async fn check_names(config: &Config, timeout: Duration) -> Result<Vec<Diagnostic>> {
    let written = Desired::written(config, &[]);
    let answers = dns::ask(dns::names(&written), timeout).await;
    let (own, shrunk) = (BTreeSet::new(), BTreeSet::new());
    let known = Known { answers: &answers, own: &own, serving: None, shrunk: &shrunk };
    let resolved = complete(config, partial::resolve(&written, &known))?;
    Ok(config.warnings(notes(config, &resolved)))
}

/// Fails if a host name has no address that can be used.
fn complete(config: &Config, resolved: Resolved) -> Result<Resolved> {
    if resolved.gaps.is_empty() {
        return Ok(resolved);
    }
    let hosts = resolved.desired.incomplete.hosts.iter().zip(&resolved.gaps);
    let findings = hosts.map(|(host, gap)| {
        let at = &config.destination(gap.spot).at;
        Message::about(at, format!("`{}` {}", host.host, host.cause))
    });
    let errors = config.errors(findings.collect());
    match resolved.gaps.iter().all(|gap| gap.temporary) {
        true => Err(Failure::Unresolved(errors)),
        false => Err(Failure::Config(errors)),
    }
}

fn notes(config: &Config, resolved: &Resolved) -> Vec<Message> {
    let notes = resolved.notes.iter();
    notes.map(|(spot, text)| Message::about(&config.destination(*spot).at, text)).collect()
}

/// Reports missing interfaces at their places in the file, if the file names them.
fn no_interfaces(config: &Config, target: &ConfigFile, names: &[String]) -> Vec<Diagnostic> {
    let message = |name: &String| format!("there is no interface {name}");
    if !target.interfaces.is_empty() {
        return names.iter().map(|name| Diagnostic::without_place(message(name))).collect();
    }
    let findings = names.iter().map(|name| Message::about(&config.interface(name), message(name)));
    config.errors(findings.collect())
}

/// Returns the interfaces of the command line, or else of the file.
///
/// # Errors
/// There are none.
pub fn interfaces(text: &Text, target: &ConfigFile, config: &Config) -> Result<Vec<String>> {
    let interfaces = match target.interfaces.is_empty() {
        true => &config.interfaces,
        false => &target.interfaces,
    };
    if interfaces.is_empty() {
        return Err(Failure::Usage(format!(
            "{} names no interfaces; add `interfaces: [...]` or give -i",
            text.name
        )));
    }
    Ok(interfaces.clone())
}
