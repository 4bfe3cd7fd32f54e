//! Whether what serves is what its file says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::cli::Target;
use crate::failure::Result;
use crate::generation::Description;
use crate::plan::{Desired, Name};
use crate::wanted::{Text, interfaces, is_kept};

/// What a generation was made of, read again; `None` where that cannot be found again.
pub fn source(description: &Description) -> Option<(Text, Target)> {
    let origin = &description.origin;
    let target =
        Target { file: PathBuf::from(&origin.file), interfaces: origin.interfaces.clone() };
    // of standard input, or gone
    if !target.file.is_absolute() || !is_kept(&target.file) {
        return None;
    }
    Some((Text::read(&target.file).ok()?, target))
}

/// Whether applying the text would change rules or interfaces. Host names and `any` are taken to stand
/// for the addresses that serve.
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
    let names: BTreeMap<Name, IpAddr> = desired
        .upstreams()
        .filter_map(|upstream| Some((upstream.named()?, upstream.address.ip)))
        .collect();
    let Ok(wanted) = Desired::new(&config, &interfaces, &names) else { return Ok(true) };
    // what follows from this host's addresses is not in the file
    let (addresses, broadcasts) = (desired.addresses.clone(), desired.broadcasts.clone());
    Ok(Desired { addresses, broadcasts, ..wanted } != *desired)
}
