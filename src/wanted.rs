//! A configuration file, read and ready to be compared with the kernel.

use std::fs::File;
use std::io::{self, Read};
use std::path::{self, Path};

use anyhow::anyhow;
use sha2::{Digest, Sha256};

use crate::addresses;
use crate::cli::Target;
use crate::config::{Config, Diagnostic, Host};
use crate::failure::{Failure, Result};
use crate::generation::{self, Origin};
use crate::netlink::Netlink;
use crate::observe::Observed;
use crate::partial;
use crate::plan::Desired;
use crate::resolve;
use crate::state::ReadGuard;

/// The longest text of a configuration, in bytes.
pub const LONGEST: u64 = 16 << 20;

/// The name that stands for standard input.
pub const STANDARD_INPUT: &str = "-";

/// True for a file that says the same whoever opens it, and when: no pipe and no descriptor.
pub fn is_kept(path: &Path) -> bool {
    let of_process = ["/dev", "/proc"].iter().any(|directory| path.starts_with(directory));
    !of_process && path.is_file()
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

/// What a file wants of the kernel.
pub struct Wanted {
    pub origin: Origin,
    /// `None`: the text was applied before and is not judged again.
    pub config: Option<Config>,
    pub desired: Desired,
    pub warnings: Vec<Diagnostic>,
    /// What of the file is not in `desired`, in words.
    pub missing: Vec<String>,
}

impl Wanted {
    /// Judges and resolves the text.
    pub async fn new(text: &Text, target: &Target) -> Result<Wanted> {
        let config = text.parse()?;
        let interfaces = interfaces(text, target, &config)?;
        let names = resolve::names(&config).await.all(&config).map_err(Failure::Config)?;
        let mut warnings = config.warnings.clone();
        warnings.extend(config.warnings(names.warnings));
        let desired =
            Desired::new(&config, &interfaces, &names.addresses).map_err(Failure::Config)?;
        let origin = text.origin(target, text.digest(target));
        Ok(Wanted { origin, config: Some(config), desired, warnings, missing: Vec::new() })
    }

    /// Like [`Wanted::new`], without what is not there now.
    pub async fn now(text: &Text, target: &Target, observed: &Observed) -> Result<Wanted> {
        let mut config = text.parse()?;
        let mut interfaces = interfaces(text, target, &config)?;
        let all = interfaces.join(", ");
        let mut names = resolve::names(&config).await;
        let mut warnings = config.warnings.clone();
        warnings.extend(config.warnings(std::mem::take(&mut names.warnings)));
        let is_here = |name: &str| observed.interfaces.contains_key(name);
        let serving = observed.serving().and_then(|number| observed.generations.get(&number));
        let serving = serving.map(|generation| &generation.description.desired);
        let missing = partial::reduce(&mut config, &mut interfaces, &mut names, is_here, serving);
        if interfaces.is_empty() {
            return Err(anyhow!("none of the interfaces is here: {all}").into());
        }
        let desired =
            Desired::new(&config, &interfaces, &names.addresses).map_err(Failure::Config)?;
        let digest = match missing.is_empty() {
            true => text.digest(target),
            false => String::new(),
        };
        let origin = text.origin(target, digest);
        Ok(Wanted { origin, config: Some(config), desired, warnings, missing })
    }

    /// What the current generation was made of, if it was made of this very text: judging that of
    /// 10,000 rules again takes several times as long as all the rest. `None` where host names
    /// may have become others.
    pub fn again(text: &Text, target: &Target, guard: &ReadGuard) -> Option<Wanted> {
        let digest = text.digest(target);
        let desired = generation::made_of(guard, guard.current()?, &digest)?;
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
