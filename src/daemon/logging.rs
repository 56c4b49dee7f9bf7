//! The log: to standard error, for people or as JSON, with a filter that can change while meshd runs.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::{Config, LogFormat};

/// A handle on the filter.
pub(super) struct Logging(reload::Handle<EnvFilter, Registry>);

impl Logging {
    /// Starts logging as the configuration says. A second start in one process changes nothing.
    pub(super) fn start(config: &Config) -> Self {
        let (filter, handle) = reload::Layer::new(EnvFilter::new(&config.log));
        let registry = tracing_subscriber::registry().with(filter);
        let layer = fmt::layer().with_writer(stderr).with_target(false);
        let started = match config.log_format {
            LogFormat::Text => registry.with(layer.with_ansi(stderr().is_terminal())).try_init(),
            LogFormat::Json => registry.with(layer.json()).try_init(),
        };
        if let Err(error) = started {
            eprintln!("meshd: logging was started already: {error}");
        }
        Logging(handle)
    }

    /// Sets another filter; the configuration has checked it.
    pub(super) fn filter(&self, filter: &str) {
        if let Err(error) = self.0.reload(EnvFilter::new(filter)) {
            tracing::warn!("the log filter cannot change: {error}");
        }
    }
}
