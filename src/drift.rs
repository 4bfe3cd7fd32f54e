//! Whether what serves is what its file says.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::cli::Target;
use crate::config::Host;
use crate::failure::Result;
use crate::generation::Description;
use crate::plan::Desired;
use crate::wanted::{Text, interfaces};

/// What a generation was made of, read again; `None` where that cannot be found again.
pub fn source(description: &Description) -> Option<(Text, Target)> {
    let origin = &description.origin;
    let target =
        Target { file: PathBuf::from(&origin.file), interfaces: origin.interfaces.clone() };
    // standard input, or a name that was good elsewhere
    if !target.file.is_absolute() {
        return None;
    }
    Some((Text::read(&target.file).ok()?, target))
}

/// Whether applying the text would change rules or interfaces. Host names are taken to have the
/// addresses that serve.
///
/// # Errors
/// The text is no configuration, or names what does not serve yet and may not resolve.
pub fn differs(text: &Text, target: &Target, description: &Description) -> Result<bool> {
    let desired = &description.desired;
    if text.digest(target) == description.origin.digest {
        return Ok(false);
    }
    let config = text.parse()?;
    let interfaces = interfaces(text, target, &config)?;
    let names: BTreeMap<_, _> = desired
        .upstreams()
        .filter_map(|upstream| match &upstream.host {
            Host::Name(name) => Some((name.clone(), upstream.address)),
            Host::Address(_) => None,
        })
        .collect();
    Ok(Desired::new(&config, &interfaces, &names).ok().as_ref() != Some(desired))
}
