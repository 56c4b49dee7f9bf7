//! Where node lists come from, and what a new one changes.
//!
//! `nodes_file` reads the static list, `records` what the servers say, `saved` what was kept of that, `reconcile` compares two
//! lists, `foreign` says what a machine without meshd has to run (all pure), `source` watches the file. None of them knows the engine: whoever applies a list turns it into tables.

pub mod attach;
pub mod foreign;
pub mod known;
pub mod nodes_file;
pub mod plan;
pub mod reconcile;
pub mod records;
pub mod saved;
pub mod source;
