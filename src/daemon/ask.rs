//! What bare `meshd` asks on a terminal: whether to join a cluster, and then what that needs.
//!
//! Owns the questions. An answer is a configuration key with its value, checked as the key's value always is; what is
//! typed as a token is not shown.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::bail;

use crate::config::load::{LoadError, Loader};
use crate::membership::record::Role;
use crate::membership::token::PREFIX;
use crate::sys::terminal;

/// How often a question is put before the answers are taken for no.
const PATIENCE: usize = 3;

/// Whether there is somebody to ask.
pub fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks, and says what to start with.
pub fn ask() -> anyhow::Result<(Role, Loader)> {
    if !yes("Join an existing cluster? [y/N] ")? {
        eprintln!("Starting a new cluster on this machine, as `meshd server` does.");
        return Ok((Role::Server, Loader::default()));
    }
    eprintln!("On a server of that cluster `meshctl token create` prints a token to paste here.");
    let mut flags = vec![good("token", || secret("Token (not shown): "))?];
    if !flags[0].1.starts_with(PREFIX) {
        flags.push(good("server", || line("That is a shared secret, so: which server (https://host:9345)? "))?);
    }
    Ok((Role::Agent, Loader { flags, ..Loader::default() }))
}

fn yes(question: &str) -> anyhow::Result<bool> {
    for _ in 0..PATIENCE {
        match line(question)?.to_ascii_lowercase().as_str() {
            "y" | "yes" => return Ok(true),
            "" | "n" | "no" => return Ok(false),
            _ => eprintln!("That is neither yes nor no: type y or n."),
        }
    }
    bail!("that was no answer: nothing is started")
}

/// The key with the value that was typed, as soon as the key takes it.
fn good(key: &str, question: impl Fn() -> io::Result<String>) -> anyhow::Result<(String, String)> {
    for _ in 0..PATIENCE {
        let flag = (key.to_owned(), question()?);
        if flag.1.is_empty() {
            eprintln!("Nothing was typed.");
            continue;
        }
        match (Loader { flags: vec![flag.clone()], ..Loader::default() }).load() {
            Ok(_) => return Ok(flag),
            // not where it stands: it stands nowhere
            Err(LoadError::Config(error)) => eprintln!("{}", error.problem),
            Err(error) => return Err(error.into()),
        }
    }
    bail!("no {key} was given: nothing is started")
}

fn secret(question: &str) -> io::Result<String> {
    let stdin = io::stdin();
    let _quiet = terminal::quiet(&stdin)?;
    line(question)
}

fn line(question: &str) -> io::Result<String> {
    eprint!("{question}");
    io::stderr().flush()?;
    let mut answer = String::new();
    if io::stdin().lock().read_line(&mut answer)? == 0 {
        eprintln!();
        // nobody is there any more: that is no answer, and above all not a no
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the question was not answered: nothing is started"));
    }
    Ok(answer.trim().to_owned())
}
