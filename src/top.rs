//! `meshctl top`: the mesh as it lives, on a terminal.
//!
//! Owns the terminal while it is shown, and gives it back as it was however that ends: by a key, a signal or a panic. What is
//! shown is `state`'s (samples and keys in, rows out), how it looks `draw`'s; neither knows a terminal, a clock or a socket.

pub mod draw;
pub mod state;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use self::state::{Sample, State};
use crate::admin::client::{Client, ClientError};

/// Between two samples.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// So long a sample or a signal may wait while no key is pressed.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Why it could not be shown, or ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// meshd did not answer the first question, or refuses for good.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The terminal failed, or is gone.
    #[error("the terminal cannot be used: {0}")]
    Terminal(#[from] io::Error),
    /// Whoever asks meshd has ended, which it never does.
    #[error("the thread that asks meshd has ended; please report this")]
    Sampler,
}

/// The terminal, taken over: another screen, keys as they are pressed. It is given back when this goes, and before a panic
/// speaks.
pub struct Screen(DefaultTerminal);

impl Screen {
    /// Takes the terminal over.
    pub fn enter() -> io::Result<Self> {
        // this also hooks into panics
        match ratatui::try_init() {
            Ok(terminal) => Ok(Screen(terminal)),
            Err(error) => {
                ratatui::restore();
                Err(error)
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// Gives the terminal back where no [`Screen`] goes any more.
pub fn give_back() {
    ratatui::restore();
}

/// Shows the mesh until `q`, Ctrl-C or `stop`. A meshd that goes away is waited for, once it has answered.
pub fn run(client: &Client, colour: bool, stop: &AtomicBool) -> Result<(), TopError> {
    let started = Instant::now();
    let mut state = State::default();
    state.take(sample(client, started)?);
    let (out, samples) = mpsc::channel();
    let client = client.clone();
    // asked from a thread of its own, since a meshd that hangs must not make keys wait; it ends with the process
    thread::spawn(move || ask(&client, started, &out));
    let mut screen = Screen::enter()?;
    show(&mut screen.0, &mut state, &samples, colour, stop)
}

fn show(
    terminal: &mut DefaultTerminal,
    state: &mut State,
    samples: &Receiver<Result<Sample, ClientError>>,
    colour: bool,
    stop: &AtomicBool,
) -> Result<(), TopError> {
    let mut changed = true;
    while !stop.load(Ordering::Relaxed) {
        match samples.try_recv() {
            Ok(Ok(sample)) => state.take(sample),
            Ok(Err(error)) if error.may_pass() => state.away(error.to_string()),
            Ok(Err(error)) => return Err(error.into()),
            Err(TryRecvError::Disconnected) => return Err(TopError::Sampler),
            Err(TryRecvError::Empty) if !changed => {
                changed = event::poll(LOOK_EVERY)?;
                if !changed {
                    continue;
                }
            }
            Err(TryRecvError::Empty) => {}
        }
        changed = false;
        if event::poll(Duration::ZERO)? {
            changed = true;
            match event::read()? {
                // some terminals also tell of keys that are let go
                Event::Key(key) if key.kind != KeyEventKind::Release && state.press(key.code, key.modifiers) => {
                    return Ok(());
                }
                _ => {}
            }
        }
        terminal.draw(|frame| draw::draw(frame, state, colour))?;
    }
    Ok(())
}

/// Asks again and again, until nobody listens.
fn ask(client: &Client, started: Instant, out: &Sender<Result<Sample, ClientError>>) {
    loop {
        thread::sleep(SAMPLE_EVERY);
        if out.send(sample(client, started)).is_err() {
            return;
        }
    }
}

fn sample(client: &Client, started: Instant) -> Result<Sample, ClientError> {
    let (stats, peers) = (client.stats()?, client.peers()?);
    Ok(Sample { stats, peers, at: started.elapsed() })
}
