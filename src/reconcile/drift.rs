//! Compares the active configuration with its file.

use std::path::PathBuf;

use crate::datapath::description::Description;
use crate::desired::Desired;
use crate::error::Result;
use crate::reconcile::observe::Observed;
use crate::reconcile::source::{ConfigFile, Text, interfaces, is_kept};

/// Reads the file of a generation again; `None` if it cannot be found.
pub fn source(description: &Description) -> Option<(Text, ConfigFile)> {
    let origin = &description.origin;
    let target =
        ConfigFile { file: PathBuf::from(&origin.file), interfaces: origin.interfaces.clone() };
    // of standard input, or gone
    if !target.file.is_absolute() || !is_kept(&target.file) {
        return None;
    }
    Some((Text::read(&target.file).ok()?, target))
}

/// Returns true if the text differs from the one that was applied. The addresses of host names and
/// of `any` do not matter, nor does the alternative name by which the file names an interface.
///
/// # Errors
/// The text is no configuration.
pub fn differs(
    text: &Text,
    target: &ConfigFile,
    description: &Description,
    observed: &Observed,
) -> Result<bool> {
    let desired = &description.desired;
    if text.digest(target) == description.origin.digest {
        return Ok(false);
    }
    let config = text.parse()?;
    let interfaces = interfaces(text, target, &config)?;
    let interfaces: Vec<String> = interfaces.iter().map(|name| observed.canonical(name)).collect();
    Ok(Desired::written(&config, &interfaces) != desired.as_written())
}
