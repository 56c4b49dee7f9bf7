//! `meshctl doctor` for people: a line a check, its fix under it.

use std::fmt::Write;

use super::{Grid, Look, Paint, clean};
use crate::doctor::{Level, Report};

/// `meshctl doctor`.
pub fn doctor(report: &Report, look: Look) -> String {
    let mut grid = Grid::new(&["CHECK", "STATE", "FOUND"]);
    for check in &report.checks {
        let (state, paint) = match check.level {
            Level::Ok => ("ok", Paint::Plain),
            Level::Skipped => ("skipped", Paint::Plain),
            Level::Warning => ("warning", Paint::Warn),
            Level::Bad => ("bad", Paint::Bad),
        };
        grid.row(paint, vec![check.name.to_owned(), state.to_owned(), check.found.replace('\n', "; ")]);
    }
    let table = grid.draw(look);
    let mut lines = table.lines();
    let mut out = lines.next().map(|header| format!("{header}\n")).unwrap_or_default();
    for (line, check) in lines.zip(&report.checks) {
        let _ = writeln!(out, "{line}");
        if let Some(fix) = &check.fix {
            let _ = writeln!(out, "  fix: {}", clean(fix));
        }
    }
    let count = |level| report.checks.iter().filter(|check| check.level == level).count();
    let (bad, warnings) = (count(Level::Bad), count(Level::Warning));
    let verdict = match (bad, warnings) {
        (0, 0) => Paint::Good.on("Nothing is wrong.", look),
        (0, n) => format!("Nothing is bad; {n} to look at."),
        (bad, n) => Paint::Bad.on(&format!("{bad} bad, {n} to look at: the fixes stand above."), look),
    };
    let _ = writeln!(out, "\n{verdict}");
    out
}
