//! Builds, connects and stops everything.

use crate::config::Config;
use crate::config::load::Loader;

/// Runs the data plane until it is told to stop. `loader` reads the configuration again at SIGHUP.
pub async fn run(_config: Config, _loader: Loader) -> anyhow::Result<()> {
    anyhow::bail!("the data plane is not there yet")
}

/// Removes the device, routes and rules that a stopped daemon leaves on purpose.
pub async fn cleanup(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("the data plane is not there yet")
}
