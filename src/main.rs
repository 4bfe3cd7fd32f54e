//! The entry point: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use udplb::cli::{Cli, Command};
use udplb::failure::{Failure, catch, say};
use udplb::{commands, complete, journal, resolve};

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|name| name == resolve::PROCESS) {
        return resolve::answer();
    }
    complete::answer();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            // clap's own code, 2, means pending changes here
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    log_to_stderr(&cli);
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
            ExitCode::from(failure.exit_code())
        }
    }
}

fn log_to_stderr(cli: &Cli) {
    // a service tells of every change, a command of trouble
    let serves = matches!(cli.command, Some(Command::Arpd(_)));
    let level = match (cli.global.quiet, cli.global.verbose) {
        (true, _) => log::LevelFilter::Error,
        (false, 0) if serves => log::LevelFilter::Info,
        (false, 0) => log::LevelFilter::Warn,
        (false, 1) => log::LevelFilter::Info,
        (false, _) => log::LevelFilter::Debug,
    };
    let mut logger = env_logger::Builder::new();
    logger.filter_module("udplb", level).format_timestamp(None).format_target(false);
    journal::format(&mut logger);
    logger.parse_env("RUST_LOG").init();
}
