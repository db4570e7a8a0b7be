//! A report against an earlier one.

use std::fmt::Write;

use serde::Serialize;

use super::report::{Column, Figure, Report, Row, Unit};

/// How figures have changed since an earlier report.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What has changed by more than the noise, in the order of the report.
    pub changes: Vec<Change>,
    /// How many figures are as they were, within the noise.
    pub alike: usize,
    /// The ways that the earlier report does not have.
    pub new: Vec<String>,
    /// The ways that only the earlier report has.
    pub gone: Vec<String>,
    /// Of times: how much slower the host is than it was, by what others than firn took, in thousandths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<u64>,
}

/// One figure that has changed.
#[derive(Clone, Debug, Serialize)]
pub struct Change {
    /// The way.
    pub name: String,
    /// Which of its figures: a column of the table.
    pub figure: String,
    /// The unit of all that follow.
    pub unit: Unit,
    /// The earlier value; a time as it would be on the host as it is now.
    pub before: u64,
    /// The value now.
    pub now: u64,
    /// The change that would still have been noise.
    pub noise: u64,
}

impl Change {
    /// Whether there is more of it than there was.
    #[must_use]
    pub fn is_worse(&self) -> bool {
        self.now > self.before
    }
}

/// How fast the host is: the factor by which times have grown, and how far single figures are from it.
#[derive(Clone, Copy)]
struct Host {
    factor: f64,
    scatter: f64,
}

impl Comparison {
    /// Compares the rows that both reports have, by name. None if the reports are of different things or units.
    #[must_use]
    pub fn new(before: &Report, now: &Report) -> Option<Self> {
        if before.subject != now.subject || before.unit() != now.unit() {
            return None;
        }
        let missing = |from: &Report, to: &Report| {
            let names = from.rows.iter().map(|row| row.name.clone());
            names.filter(|name| row_of(to, name).is_none()).collect()
        };
        let host = host(before, now);
        let mut found = Self {
            changes: Vec::new(),
            alike: 0,
            new: missing(now, before),
            gone: missing(before, now),
            host: host.map(|host| thousandths(host.factor)),
        };
        // What others took is what firn's times are measured by.
        for row in now.rows.iter().filter(|row| host.is_none() || !row.reference) {
            if let Some(earlier) = row_of(before, &row.name) {
                for column in &now.columns {
                    found.add((earlier, row), column, host);
                }
            }
        }
        Some(found)
    }

    fn add(&mut self, (earlier, row): (&Row, &Row), column: &Column, host: Option<Host>) {
        let [Some(was), Some(is)] = [earlier, row].map(|row| row.figures.get(&column.name)) else {
            return;
        };
        let host = host.filter(|_| column.unit == Unit::Nanoseconds);
        let Host { factor, scatter } = host.unwrap_or(Host { factor: 1.0, scatter: 0.0 });
        let before = scaled(was.value, factor);
        let noise = scaled(was.spread, factor)
            .max(is.spread)
            .max(before / least_noise(column.unit, was, is))
            .max(scaled(before, scatter));
        if before.abs_diff(is.value) <= noise {
            self.alike += 1;
            return;
        }
        let (name, figure) = (row.name.clone(), column.name.clone());
        self.changes.push(Change { name, figure, unit: column.unit, before, now: is.value, noise });
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
            let word = if change.is_worse() { "worse" } else { "better" };
            let Change { name, figure, unit, before, now, noise } = change;
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{word}: {name}: {figure} {} -> {}, {}; noise {}",
                unit.figure(*before),
                unit.figure(*now),
                percent(*before, *now),
                unit.figure(*noise)
            );
        }
        for (what, names) in
            [("not in the earlier report", &self.new), ("not measured", &self.gone)]
        {
            for name in names {
                let _ = writeln!(text, "{what}: {name}");
            }
        }
        if let Some(host) = self.host {
            let _ = writeln!(
                text,
                "others than firn took {}.{:02} times as long as then: earlier times are multiplied by that",
                host / 1000,
                host % 1000 / 10
            );
        }
        let alike = self.alike;
        let _ = writeln!(text, "as before, within the noise: {alike} figures");
        text
    }
}

fn row_of<'a>(report: &'a Report, name: &str) -> Option<&'a Row> {
    report.rows.iter().find(|row| row.name == name)
}

/// Changes below this part of the earlier value are noise, even where its runs were alike.
fn least_noise(unit: Unit, was: &Figure, is: &Figure) -> u64 {
    match unit {
        _ if was.runs.min(is.runs) == 1 => 10,
        Unit::Instructions => 200,
        Unit::Nanoseconds => 20,
        Unit::Kib => 10,
    }
}

/// By what the times of others than firn have changed, if there are any in both.
fn host(before: &Report, now: &Report) -> Option<Host> {
    let ratio = |was: &Figure, is: &Figure| ratio(is.value, was.value.max(1));
    let mut ratios = Vec::new();
    for row in now.rows.iter().filter(|row| row.reference) {
        let Some(earlier) = row_of(before, &row.name) else { continue };
        for column in now.columns.iter().filter(|column| column.unit == Unit::Nanoseconds) {
            let both = earlier.figures.get(&column.name).zip(row.figures.get(&column.name));
            ratios.extend(both.map(|(was, is)| ratio(was, is)));
        }
    }
    let factor = median(&mut ratios)?;
    let mut scatter: Vec<f64> = ratios.iter().map(|ratio| (ratio / factor - 1.0).abs()).collect();
    Some(Host { factor, scatter: median(&mut scatter)? })
}

fn median(values: &mut [f64]) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().filter(|value| value.is_finite())
}

#[expect(clippy::cast_precision_loss, reason = "a few digits of it matter")]
fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to as f64
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a few digits of it matter, and neither is below zero"
)]
fn scaled(value: u64, factor: f64) -> u64 {
    (value as f64 * factor).round() as u64
}

fn thousandths(factor: f64) -> u64 {
    scaled(1000, factor)
}

fn percent(before: u64, now: u64) -> String {
    let sign = if now > before { '+' } else { '-' };
    let tenths = before.abs_diff(now).saturating_mul(1000) / before.max(1);
    format!("{sign}{}.{} %", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::{report, steps};
    use super::*;

    fn figure<'a>(report: &'a mut Report, row: usize, name: &str) -> &'a mut Figure {
        report.rows[row].figures.get_mut(name).expect("it has it")
    }

    #[test]
    fn what_is_worse_by_more_than_the_noise_is_said() {
        let before = report();
        let same = Comparison::new(&before, &before).expect("one unit");
        assert!(!same.is_worse() && same.changes.is_empty() && same.alike > 10, "{same:?}");
        let mut now = before.clone();
        // The spread of its runs was 31 million.
        figure(&mut now, 0, "total").value += 30_000_000;
        figure(&mut now, 0, "memory").value *= 2;
        figure(&mut now, 1, "total").value -= 300_000_000;
        now.rows[2].name = "another".to_owned();
        let found = Comparison::new(&before, &now).expect("one unit");
        assert!(found.is_worse());
        let text = "\
worse: firn: memory 5.2 -> 10.4, +100.0 %; noise 0.5
better: firn: 3 at once: total 1.860 -> 1.560, -16.1 %; noise 0.186
not in the earlier report: another
not measured: another <one>
as before, within the noise: 11 figures
";
        assert_eq!(found.text(), text);
        now.columns[0].unit = Unit::Nanoseconds;
        assert!(Comparison::new(&before, &now).is_none());
        assert!(Comparison::new(&before, &steps([1, 1, 1], [1, 1, 1])).is_none());
    }

    #[test]
    fn a_slower_host_is_no_change_of_firns() {
        let before = steps([100, 101, 102], [200, 201, 202]);
        let slower = steps([150, 151, 155], [300, 303, 302]);
        let found = Comparison::new(&before, &slower).expect("one subject");
        assert!(found.changes.is_empty() && found.host == Some(1500), "{found:?}");
        // Now it is only as fast as others, of which it took half the time.
        let worse = steps([300, 301, 305], [300, 303, 302]);
        let text = "\
worse: firn: find 150.0 -> 300.0, +100.0 %; noise 7.5
worse: firn: read 1500.0 -> 3000.0, +100.0 %; noise 75.0
others than firn took 1.50 times as long as then: earlier times are multiplied by that
as before, within the noise: 0 figures
";
        assert_eq!(Comparison::new(&before, &worse).expect("one subject").text(), text);
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let json = serde_json::to_string(&report()).expect("it is plain data");
        let read: Report = serde_json::from_str(&json).expect("it is a report");
        let found = Comparison::new(&report(), &read).expect("one unit");
        assert!(found.changes.is_empty() && found.new.is_empty() && found.gone.is_empty());
    }
}
