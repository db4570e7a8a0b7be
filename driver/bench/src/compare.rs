//! A report against an earlier one.

use std::fmt::Write;

use serde::Serialize;

use super::report::{Figure, Report, Row, Unit, mebibytes};

/// Changes below this part of the earlier value are noise, even where its runs were alike.
const NOISE: u64 = 200;

/// How figures have changed since an earlier report.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What has changed by more than the noise, in the order of the report.
    pub changes: Vec<Change>,
    /// How many figures are as they were, within the noise.
    pub alike: usize,
    /// The subjects that the earlier report does not have.
    pub new: Vec<String>,
    /// The subjects that only the earlier report has.
    pub gone: Vec<String>,
    unit: Unit,
}

/// One figure that has changed.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The subject.
    pub name: String,
    /// Which of its figures: a column of the table.
    pub figure: String,
    /// The earlier median; memory is in KiB.
    pub before: u64,
    /// The median now.
    pub now: u64,
    /// The change that would still have been noise: the larger spread of the two, and at least half a per cent.
    pub noise: u64,
}

impl Change {
    /// Whether there is more of it than there was.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        self.now > self.before
    }
}

impl Comparison {
    /// Compares the subjects that both reports have, by name. None if the reports have different units.
    #[must_use]
    pub fn new(before: &Report, now: &Report) -> Option<Self> {
        if before.unit != now.unit {
            return None;
        }
        let missing = |from: &Report, to: &Report| {
            let names = from.rows.iter().map(|row| row.name.clone());
            names.filter(|name| row_of(to, name).is_none()).collect()
        };
        let (new, gone) = (missing(now, before), missing(before, now));
        let mut found = Self { changes: Vec::new(), alike: 0, new, gone, unit: now.unit };
        for row in &now.rows {
            if let Some(earlier) = row_of(before, &row.name) {
                found.add(earlier, row);
            }
        }
        Some(found)
    }

    fn add(&mut self, before: &Row, now: &Row) {
        let earlier = figures(before);
        for (figure, now_is) in figures(now) {
            let Some((_, was)) = earlier.iter().find(|(name, _)| *name == figure) else { continue };
            let noise = was.spread.max(now_is.spread).max(was.median / NOISE);
            if was.median.abs_diff(now_is.median) <= noise {
                self.alike += 1;
                continue;
            }
            let (name, before, now) = (now.name.clone(), was.median, now_is.median);
            self.changes.push(Change { name, figure, before, now, noise });
        }
    }

    /// Whether anything has become worse.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        self.changes.iter().any(Change::is_worse)
    }

    /// Formats it: a line for each change.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for change in &self.changes {
            let shown = |value: u64| match &*change.figure {
                MEMORY => mebibytes(value),
                _ => self.unit.figure(value),
            };
            let word = if change.is_worse() { "worse" } else { "better" };
            let Change { name, figure, before, now, noise } = change;
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{word}: {name}: {figure} {} -> {}, {}; noise {}",
                shown(*before),
                shown(*now),
                percent(*before, *now),
                shown(*noise)
            );
        }
        for (what, names) in
            [("not in the earlier report", &self.new), ("not measured", &self.gone)]
        {
            for name in names {
                let _ = writeln!(text, "{what}: {name}");
            }
        }
        let alike = self.alike;
        let _ = writeln!(text, "as before, within the noise: {alike} figures");
        text
    }
}

const MEMORY: &str = "memory";

fn row_of<'a>(report: &'a Report, name: &str) -> Option<&'a Row> {
    report.rows.iter().find(|row| row.name == name)
}

/// A row's figures by their columns.
fn figures(row: &Row) -> Vec<(String, Figure)> {
    let stages = row.stages.iter().map(|(stage, figure)| (stage.as_str().to_owned(), *figure));
    let work = [("user", row.user), ("sys", row.system), ("total", row.total)];
    // It was measured once.
    let memory = row.memory_kib.map(|kib| (MEMORY, Figure { median: kib, spread: kib / 10 }));
    let rest = work.into_iter().chain(memory);
    stages.chain(rest.map(|(name, figure)| (name.to_owned(), figure))).collect()
}

fn percent(before: u64, now: u64) -> String {
    let sign = if now > before { '+' } else { '-' };
    let tenths = before.abs_diff(now).saturating_mul(1000) / before.max(1);
    format!("{sign}{}.{} %", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    #[test]
    fn what_is_worse_by_more_than_the_noise_is_said() {
        let before = report();
        let same = Comparison::new(&before, &before).expect("one unit");
        assert!(!same.is_worse() && same.changes.is_empty() && same.alike > 10, "{same:?}");
        let mut now = before.clone();
        // The spread of its runs was 31 million.
        now.rows[0].total.median += 30_000_000;
        now.rows[0].memory_kib = now.rows[0].memory_kib.map(|kib| kib * 2);
        now.rows[1].total.median -= 300_000_000;
        now.rows[2].name = "another".to_owned();
        let found = Comparison::new(&before, &now).expect("one unit");
        assert!(found.is_worse());
        let text = "\
worse: firn: memory 5.2 -> 10.4, +100.0 %; noise 1.0
better: firn: 3 at once: total 1.860 -> 1.560, -16.1 %; noise 0.009
not in the earlier report: another
not measured: another <one>
as before, within the noise: 9 figures
";
        assert_eq!(found.text(), text);
        now.unit = Unit::Nanoseconds;
        assert!(Comparison::new(&before, &now).is_none());
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let json = serde_json::to_string(&report()).expect("it is plain data");
        let read: Report = serde_json::from_str(&json).expect("it is a report");
        let found = Comparison::new(&report(), &read).expect("one unit");
        assert!(found.changes.is_empty() && found.new.is_empty() && found.gone.is_empty());
    }
}
