//! The fuzz targets' corpora and the findings in `tests/regressions/`, replayed without a fuzzer.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

#[test]
fn corpora() {
    for name in targets::TARGETS {
        let run = targets::target(name).expect("a target");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let inputs = inputs(&folder);
        assert!(inputs.len() >= 10, "{} has {} inputs", folder.display(), inputs.len());
        inputs.iter().for_each(|(path, bytes)| try_one(run, path, bytes));
    }
}

#[test]
fn regressions() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/regressions");
    for (path, bytes) in inputs(&folder).iter().filter(|(path, _)| path.ends_with(".bin")) {
        let file = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = file.split('-').next().unwrap_or_default();
        let run = targets::target(name).unwrap_or_else(|| panic!("{file}: no fuzz target is called {name}"));
        try_one(run, path, bytes);
    }
}

fn inputs(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.map(|path| (path.display().to_string(), std::fs::read(&path).expect("a readable file"))).collect()
}

fn try_one(run: fn(&[u8]), path: &str, bytes: &[u8]) {
    if std::panic::catch_unwind(|| run(bytes)).is_err() {
        panic!("{path}: see above");
    }
}
