//! SIGHUP: what of a changed configuration is taken over under way.

use anyhow::anyhow;

use super::logging::Logging;
use super::view::Concern;
use super::{Daemon, Source, bfd_keys, told};
use crate::config::load::Loader;
use crate::control::source::NodesFile;

impl Daemon {
    /// SIGHUP: reads the configuration and the node list again.
    pub(super) async fn reload(&mut self, loader: &Loader, logging: &Logging) {
        let new = match loader.load() {
            Ok(new) if matches!(self.source, Source::Members(_)) => new.of_member(),
            Ok(new) => new,
            Err(error) => {
                let error = anyhow!(error);
                return self
                    .shared
                    .problem(Concern::Config, format!("{}; the former configuration stays", told(&error)));
            }
        };
        self.shared.settled(Concern::Config);
        let changes = self.config.live_changes(&new);
        for key in &changes.restart {
            tracing::warn!("`{key}` cannot change while meshd runs: restart it to take that over");
        }
        if !changes.live.is_empty() {
            tracing::info!("taken over: {}", changes.live.join(", "));
        }
        if changes.live.contains(&"log") {
            logging.filter(&new.log);
        }
        let path = new.nodes_file.as_ref().filter(|_| changes.live.contains(&"nodes-file"));
        if let (Some(path), Source::File(nodes_file)) = (path, &mut self.source) {
            *nodes_file = NodesFile::new(path.clone(), self.config.port);
        }
        if changes.restart.is_empty() {
            match bfd_keys(&new) {
                Ok(keys) => self.known.set_bfd_keys(keys),
                Err(error) => self.shared.problem(Concern::Config, format!("{}; the former keys stay", told(&error))),
            }
            self.config = new;
            if let Source::Members(members) = &mut self.source {
                if let Err(error) = members.configure(&self.config) {
                    self.shared.problem(Concern::Config, format!("{}; the former token stays", told(&error)));
                }
                self.say_hello();
            }
            if self.begun {
                let list = self.shared.list.load_full();
                self.apply(&list).await;
            }
        }
        self.poll_nodes().await;
    }
}
