//! What bare `meshd` asks on a terminal: whether to join a cluster, and then what that needs.
//!
//! Owns the questions. An answer is a configuration key with its value, checked as the key's value always is; what is
//! typed as a token is not shown.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::bail;

use crate::config::load::Loader;
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
    let yes = matches!(line("Join an existing cluster? [y/N] ")?.to_ascii_lowercase().as_str(), "y" | "yes");
    let mut loader = Loader::default();
    if !yes {
        eprintln!("Starting a new cluster on this machine, as `meshd server` does.");
        return Ok((Role::Server, loader));
    }
    eprintln!("On a server of that cluster `meshctl token create` prints a token to paste here.");
    for _ in 0..PATIENCE {
        loader.flags = vec![("token".to_owned(), secret("Token (not shown): ")?)];
        match loader.load() {
            Ok(config) if config.token.is_some() => break,
            Ok(_) => {}
            Err(error) => eprintln!("{error}"),
        }
        loader.flags.clear();
    }
    let Some((_, token)) = loader.flags.first() else { bail!("no token was given: nothing is started") };
    if !token.starts_with(PREFIX) {
        let server = line("That is a shared secret, so: which server (https://host:9345)? ")?;
        loader.flags.push(("server".to_owned(), server));
    }
    Ok((Role::Agent, loader))
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
