//! A configuration file, read and ready to be compared with the kernel.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{self, Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use sha2::{Digest, Sha256};

use crate::config::{self, Config, Diagnostic, Host, Unlocated};
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
pub const LONGEST: u64 = 16 << 20;

/// The name that stands for standard input.
pub const STANDARD_INPUT: &str = "-";

/// True for a file that says the same whoever opens it, and when: no pipe and no descriptor.
pub fn is_kept(path: &Path) -> bool {
    let of_process = ["/dev", "/proc"].iter().any(|directory| path.starts_with(directory));
    !of_process && path.is_file()
}

/// Wait for the addresses of all host names together, where no option says otherwise.
pub const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// A configuration file and where it is to be applied.
pub struct Target {
    pub file: PathBuf,
    /// Instead of the file's, unless there are none.
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
            return Err(unreadable("longer than 16 MiB, which no configuration is".into()));
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

    pub fn parse(&self) -> Result<Config> {
        Config::parse(&self.name, &self.text).map_err(Failure::Config)
    }

    fn origin(&self, target: &Target, digest: String) -> Origin {
        Origin { digest, file: self.place(), interfaces: target.interfaces.clone() }
    }

    /// The name by which a later command finds the file; [`STANDARD_INPUT`] if none will.
    fn place(&self) -> String {
        match path::absolute(&self.name) {
            Ok(path) if is_kept(&path) => path.display().to_string(),
            _ => STANDARD_INPUT.into(),
        }
    }

    /// Stands for what this text says to this udplb under these arguments.
    pub fn digest(&self, target: &Target) -> String {
        let mut digest = Sha256::new();
        // it says what language the text is in
        let extension = Path::new(&self.name).extension().unwrap_or_default().to_string_lossy();
        let interfaces = target.interfaces.join(" ");
        for part in [env!("CARGO_PKG_VERSION"), &interfaces, &extension, &self.text] {
            digest.update(part.len().to_le_bytes());
            digest.update(part);
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A good configuration, and where it is to be applied.
pub struct Request<'a> {
    text: &'a Text,
    target: &'a Target,
    config: Config,
    interfaces: Vec<String>,
    /// For the host names.
    timeout: Duration,
}

impl<'a> Request<'a> {
    /// # Errors
    /// The text is no configuration, or there are no interfaces.
    pub fn new(text: &'a Text, target: &'a Target, timeout: Duration) -> Result<Request<'a>> {
        let config = text.parse()?;
        let interfaces = interfaces(text, target, &config)?;
        Ok(Request { text, target, config, interfaces, timeout })
    }

    /// Asks for the host names.
    async fn resolve(&self, observed: &Observed, netlink: &Netlink) -> Result<Resolved> {
        let serving = observed.serving().and_then(|number| observed.generations.get(&number));
        let serving = serving.map(|generation| &generation.description.desired);
        let written = Desired::written(&self.config, &self.interfaces);
        let answers = dns::ask(dns::names(&written), self.timeout).await;
        let own = addresses::own(netlink).await?;
        let shrunk = serving.map(|serving| serving.incomplete.shrunk.clone()).unwrap_or_default();
        let known = Known { answers: &answers, own: &own, serving, shrunk: &shrunk };
        Ok(partial::resolve(&written, &known))
    }

    /// With the kernel's own names of the interfaces.
    fn canonical(self, observed: &Observed) -> Request<'a> {
        let interfaces = self.interfaces.iter().map(|name| observed.canonical(name)).collect();
        Request { interfaces, ..self }
    }
}

/// What a file wants of the kernel.
pub struct Wanted {
    pub origin: Origin,
    /// `None`: the text was applied before and is not judged again.
    pub config: Option<Config>,
    pub desired: Desired,
    pub warnings: Vec<Diagnostic>,
    /// What the file says and `desired` lacks.
    pub missing: Vec<Diagnostic>,
}

impl Wanted {
    /// Resolves a configuration; all of it, or it fails.
    pub async fn whole(
        request: Request<'_>,
        observed: &Observed,
        netlink: &Netlink,
    ) -> Result<Wanted> {
        let request = request.canonical(observed);
        let resolved = request.resolve(observed, netlink).await?;
        let resolved = whole(&request.config, resolved)?;
        Ok(Wanted::of(request, resolved))
    }

    /// Like [`Wanted::whole`], without what is missing now.
    pub async fn partial(
        request: Request<'_>,
        observed: &Observed,
        netlink: &Netlink,
    ) -> Result<Wanted> {
        let request = request.canonical(observed);
        let Request { config, .. } = &request;
        let mut resolved = request.resolve(observed, netlink).await?;
        let desired = &mut resolved.desired;
        let is_missing = |name: &&String| !observed.interfaces.contains_key(*name);
        desired.incomplete.interfaces =
            desired.interfaces.iter().filter(is_missing).cloned().collect();
        let missing = &desired.incomplete.interfaces;
        // else a slip in a name would end what serves
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
        let findings =
            hosts.iter().zip(&spots).map(|(host, at)| Unlocated::new(at, host.message()));
        diagnostics.extend(config.errors(findings.collect()));
        Ok(Wanted { missing: diagnostics, ..Wanted::of(request, resolved) })
    }

    fn of(Request { text, target, config, .. }: Request<'_>, resolved: Resolved) -> Wanted {
        let mut warnings = config.warnings.clone();
        warnings.extend(config.warnings(notes(&config, &resolved)));
        let origin = text.origin(target, text.digest(target));
        let desired = resolved.desired;
        Wanted { origin, config: Some(config), desired, warnings, missing: Vec::new() }
    }

    /// What the current generation was made of, if it was made of this very text: judging that of
    /// 10,000 rules again takes several times as long as all the rest. `None` where host names
    /// may have become others.
    pub fn again(text: &Text, target: &Target, guard: &ReadGuard) -> Option<Wanted> {
        let digest = text.digest(target);
        let desired = generation::made_of(guard, guard.current()?, &digest)?;
        if !desired.incomplete.is_empty() {
            return None;
        }
        let named = desired.upstreams().any(|upstream| matches!(upstream.host, Host::Name(_)));
        let origin = text.origin(target, digest);
        let (warnings, missing) = (Vec::new(), Vec::new());
        (!named).then_some(Wanted { origin, config: None, desired, warnings, missing })
    }

    /// Fills in what depends on the addresses that the interfaces have now.
    pub async fn expand(&mut self, netlink: &Netlink) -> Result<()> {
        if let Some(renewed) = addresses::renewed(netlink, &self.desired).await? {
            self.desired = renewed;
        }
        Ok(())
    }
}

/// Asks for the host names of a configuration that may be applied anywhere.
///
/// # Errors
/// See `whole`.
pub async fn check_names(config: &Config, timeout: Duration) -> Result<Vec<Diagnostic>> {
    let written = Desired::written(config, &[]);
    let answers = dns::ask(dns::names(&written), timeout).await;
    let (own, shrunk) = (BTreeSet::new(), BTreeSet::new());
    let known = Known { answers: &answers, own: &own, serving: None, shrunk: &shrunk };
    let resolved = whole(config, partial::resolve(&written, &known))?;
    Ok(config.warnings(notes(config, &resolved)))
}

/// # Errors
/// A host name has no address that can be used.
fn whole(config: &Config, resolved: Resolved) -> Result<Resolved> {
    if resolved.gaps.is_empty() {
        return Ok(resolved);
    }
    let hosts = resolved.desired.incomplete.hosts.iter().zip(&resolved.gaps);
    let findings = hosts.map(|(host, gap)| {
        let at = &config.destination(gap.spot).at;
        Unlocated::new(at, format!("`{}` {}", host.host, host.cause))
    });
    let errors = config.errors(findings.collect());
    match resolved.gaps.iter().all(|gap| gap.temporary) {
        true => Err(Failure::Unresolved(errors)),
        false => Err(Failure::Config(errors)),
    }
}

fn notes(config: &Config, resolved: &Resolved) -> Vec<Unlocated> {
    let notes = resolved.notes.iter();
    notes.map(|(spot, text)| Unlocated::new(&config.destination(*spot).at, text)).collect()
}

/// Each at its place in the file, unless the command line names them.
fn no_interfaces(config: &Config, target: &Target, names: &[String]) -> Vec<Diagnostic> {
    let message = |name: &String| format!("there is no interface {name}");
    if !target.interfaces.is_empty() {
        return names.iter().map(|name| Diagnostic::without_place(message(name))).collect();
    }
    let findings = names.iter().map(|name| Unlocated::new(&config.interface(name), message(name)));
    config.errors(findings.collect())
}

/// The command line's, or else the file's.
pub fn interfaces(text: &Text, target: &Target, config: &Config) -> Result<Vec<String>> {
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
