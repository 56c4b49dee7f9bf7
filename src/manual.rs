//! Man pages and shell completions, written from the command line's own definition so that they cannot differ from it.
//!
//! What `PROGRAM manual FOLDER` does, a command that packages are built with and `--help` does not show. It does not know where
//! the files belong on a machine (`packaging/`).

use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::{Shell, generate_to};

/// Writes a man page for the program and each of its commands, and completions for bash, zsh and fish, into the folder, which
/// is made where it is missing.
pub fn write(mut command: Command, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    clap_mangen::generate_to(without_help(command.clone()), folder)?;
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut command, &name, folder)?;
    }
    Ok(())
}

/// Nobody looks for a page on `help`.
fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}
