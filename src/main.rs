//! The entry point: arguments in, exit code out.

use std::env;
use std::process::ExitCode;

use clap::Parser;

use udplb::cli::Output;
use udplb::cli::output::{ErrorReport, print};
use udplb::commands::{self, Cli, Command, complete};
use udplb::desired::dns;
use udplb::error::{Failure, catch, say};
use udplb::{heap, journal};

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == dns::PROCESS) {
        return dns::answer();
    }
    complete::answer();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            if error.use_stderr() && wants_json(env::args()) {
                let _ = print(&ErrorReport::usage(&error.to_string()).line());
            }
            // clap's own code, 2, means pending changes here
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    log_to_stderr(&cli);
    if !is_service(&cli) {
        heap::use_huge_pages();
    }
    std::panic::set_hook(Box::new(|info| log::debug!("{info}")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = catch(|| runtime.block_on(commands::run(&cli)));
            result.unwrap_or_else(|panic| Err(Failure::Failed(panic)))
        }
        Err(error) => Err(Failure::Failed(error.into())),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            say(&failure);
            if cli.global.output == Output::Json {
                let _ = print(&ErrorReport::new(&failure).line());
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Returns true if arguments that clap rejects ask for JSON.
fn wants_json(words: impl Iterator<Item = String>) -> bool {
    let words: Vec<String> = words.collect();
    let alone = ["-ojson", "-o=json", "--output=json"];
    let pair = |pair: &[String]| ["-o", "--output"].contains(&&*pair[0]) && pair[1] == "json";
    words.iter().any(|word| alone.contains(&&**word)) || words.windows(2).any(pair)
}

/// Returns true for the command that runs for days.
fn is_service(cli: &Cli) -> bool {
    matches!(cli.command, Some(Command::Arpd(_)))
}

fn log_to_stderr(cli: &Cli) {
    // the daemon logs every change, commands only warnings
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => log::LevelFilter::Error,
        (false, 0) if is_service(cli) => log::LevelFilter::Info,
        (false, 0) => log::LevelFilter::Warn,
        (false, 1) => log::LevelFilter::Info,
        (false, _) => log::LevelFilter::Debug,
    };
    let mut logger = env_logger::Builder::new();
    logger.filter_module("udplb", level).format_timestamp(None).format_target(false);
    journal::format(&mut logger);
    logger.parse_env("RUST_LOG").init();
}
