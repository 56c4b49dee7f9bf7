//! `meshctl cluster matrix`: who reaches whom, as a table that an eye takes in.

use std::fmt::Write;

use super::{Look, Paint, clean};
use crate::admin::units;
use crate::membership::matrix::{Matrix, Watched};

/// Nodes that have a column; in a larger mesh pairs stand in a list, those alone that are not well.
const COLUMNS: usize = 16;
/// Loss that is worth a word, in thousandths.
const LOSSY: u32 = 10;

/// The whole of it.
pub fn matrix(matrix: &Matrix, look: Look) -> String {
    let mut out = String::new();
    if matrix.nodes.len() <= COLUMNS {
        grid(matrix, look, &mut out)
    } else {
        list(matrix, look, &mut out)
    }
    let paths = || matrix.rows.iter().flat_map(|row| &row.to);
    let (up, down) = (paths().filter(|path| path.up).count(), paths().filter(|path| !path.up).count());
    let _ = writeln!(
        out,
        "{} nodes, {up} pairs up, {down} down; round trip, and loss from 1 % on; a node watches its neighbours and whom it \
         talks to",
        matrix.nodes.len()
    );
    if !matrix.silent.is_empty() {
        let names = matrix.silent.iter().take(COLUMNS).map(|name| clean(name)).collect::<Vec<_>>().join(", ");
        let more = matrix.silent.len().saturating_sub(COLUMNS);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let _ = writeln!(out, "{}: nothing is known from {names}{more}", Paint::Warn.on("note", look));
    }
    for missing in &matrix.missing {
        let what = format!("{}: {}", clean(&missing.server), clean(&missing.problem));
        let _ = writeln!(out, "{}: what nodes told this server is not here: {what}", Paint::Warn.on("warning", look));
    }
    out
}

fn grid(matrix: &Matrix, look: Look, out: &mut String) {
    let names: Vec<String> = matrix.nodes.iter().map(|name| clean(name)).collect();
    let cell = |from: &str, to: &str| {
        let row = matrix.rows.iter().find(|row| row.from == from)?;
        row.to.iter().find(|path| path.to == to)
    };
    let first = names.iter().map(|name| name.chars().count()).chain([4]).max().unwrap_or(4);
    let width = |name: &String| name.chars().count().max(9);
    let mut head = format!("{:first$}", "FROM");
    names.iter().for_each(|name| _ = write!(head, "  {name:>0$}", width(name)));
    let _ = writeln!(out, "{}", Paint::Bold.on(&head, look));
    for from in &matrix.nodes {
        let _ = write!(out, "{:first$}", clean(from));
        for (to, name) in matrix.nodes.iter().zip(&names) {
            let (text, paint) = match cell(from, to) {
                _ if from == to => ("-".to_owned(), Paint::Plain),
                Some(path) => word(path),
                None => ("·".to_owned(), Paint::Plain),
            };
            // padded first: colour has no width
            let _ = write!(out, "  {}", paint.on(&format!("{text:>0$}", width(name)), look));
        }
        out.push('\n');
    }
}

fn list(matrix: &Matrix, look: Look, out: &mut String) {
    let unwell = |path: &&Watched| !path.up || path.loss_permille.unwrap_or(0) >= LOSSY;
    for row in &matrix.rows {
        for path in row.to.iter().filter(unwell) {
            let (text, paint) = word(path);
            let _ = writeln!(out, "{} to {}: {}", clean(&row.from), clean(&path.to), paint.on(&text, look));
        }
    }
}

fn word(path: &Watched) -> (String, Paint) {
    if !path.up {
        return ("down".to_owned(), Paint::Bad);
    }
    let took = path.rtt_us.map_or_else(|| "up".to_owned(), |us| units::round_trip(u64::from(us)));
    match path.loss_permille.filter(|loss| *loss >= LOSSY) {
        Some(loss) => (format!("{took} {}%", loss / 10), Paint::Warn),
        None => (took, Paint::Good),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::membership::matrix::{Missing, Row};

    fn path(to: &str, up: bool, loss: u32) -> Watched {
        Watched { to: to.to_owned(), up, rtt_us: up.then_some(812), loss_permille: up.then_some(loss) }
    }

    #[test]
    fn a_small_mesh_is_a_table_and_a_large_one_what_is_unwell() {
        let row = |from: &str, to| Row { from: from.to_owned(), age_ms: 1, to };
        let mut all = Matrix {
            nodes: ["a", "b", "long-name-of-c"].map(str::to_owned).into(),
            rows: vec![
                row("a", vec![path("b", true, 0), path("long-name-of-c", false, 0)]),
                row("b", vec![path("a", true, 25)]),
            ],
            silent: vec!["long-name-of-c".to_owned()],
            missing: vec![Missing { server: "https://c:9345".to_owned(), problem: "it does not answer".to_owned() }],
        };
        let text = matrix(&all, Look::default());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "FROM                    a          b  long-name-of-c");
        assert_eq!(lines[1], "a                       -     812 µs            down");
        assert_eq!(lines[2], "b               812 µs 2%          -               ·");
        assert!(
            text.contains("3 nodes, 2 pairs up, 1 down") && text.contains("nothing is known from long-name-of-c\n")
        );
        assert!(text.contains("not here: https://c:9345: it does not answer"));
        assert!(matrix(&all, Look { colour: true, ..Look::default() }).contains("\x1b[31m          down\x1b[0m"));
        all.nodes.extend((0..20).map(|n| format!("n{n}")));
        let text = matrix(&all, Look::default());
        assert!(text.starts_with("a to long-name-of-c: down\nb to a: 812 µs 2%\n23 nodes"), "{text}");
    }
}
