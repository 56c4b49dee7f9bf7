//! Where node lists come from, and what a new one changes.
//!
//! `nodes_file` reads the static list (pure), `reconcile` compares two lists (pure), `source` watches the file. None of
//! them knows the engine: whoever applies a list turns it into tables.

pub mod nodes_file;
pub mod plan;
pub mod reconcile;
pub mod source;
