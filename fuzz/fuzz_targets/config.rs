//! Reads any text as a configuration file. The first byte selects the format.
#![no_main]

use libfuzzer_sys::fuzz_target;
use udplb::config::Config;

fuzz_target!(|data: &[u8]| {
    let Some((format, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let name = if format % 2 == 0 { "fuzz.yaml" } else { "fuzz.toml" };
    match Config::parse(name, text) {
        Ok(config) => drop(config.warnings),
        Err(errors) => assert!(errors.iter().all(|error| !error.to_string().is_empty())),
    }
});
