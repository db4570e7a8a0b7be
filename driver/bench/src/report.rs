//! Reports of measurements, for people and for programs.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::{Measured, Sample, Stage};

/// Median and spread of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    /// The median.
    pub median: u64,
    /// The difference between the largest and the smallest.
    pub spread: u64,
}

impl Figure {
    /// Summarizes at least one value.
    fn of(values: impl IntoIterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.into_iter().collect();
        values.sort_unstable();
        let (least, greatest) = (*values.first()?, *values.last()?);
        Some(Self { median: values[values.len() / 2], spread: greatest - least })
    }
}

/// The unit of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Executed instructions.
    Instructions,
    /// Nanoseconds.
    Nanoseconds,
}

impl Unit {
    /// The unit in tables, 1e9 instructions or milliseconds, and its size.
    #[must_use]
    pub fn shown(self) -> (&'static str, u32) {
        match self {
            Self::Instructions => ("1e9 instructions", 1_000_000_000),
            Self::Nanoseconds => ("ms", 1_000_000),
        }
    }

    /// A figure as tables show it.
    pub(super) fn figure(self, value: u64) -> String {
        let (_, scale) = self.shown();
        scaled(value, scale, if scale > 1_000_000 { 3 } else { 1 })
    }
}

/// All figures of a benchmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Their unit.
    pub unit: Unit,
    /// The number of boots of each.
    pub runs: usize,
    /// A row for each measured subject.
    pub rows: Vec<Row>,
    /// The subjects without figures.
    pub missing: Vec<Missing>,
}

/// A subject without figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// The guest and the monitor.
    pub name: String,
    /// Why it was abandoned.
    pub why: String,
}

/// A subject's figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The guest and the monitor.
    pub name: String,
    /// How many machines at once.
    pub machines: u8,
    /// With more than one, the ratio of the work to that of one, in thousandths.
    pub times_one: Option<u64>,
    /// When a stage was reached, since the exec.
    pub stages: Vec<(Stage, Figure)>,
    /// The processor's work in the guest and in the monitor.
    pub user: Figure,
    /// The processor's work in the host's kernel.
    pub system: Figure,
    /// Both.
    pub total: Figure,
    /// Resident memory besides the guest's, in KiB.
    pub memory_kib: Option<u64>,
}

impl Report {
    /// Summarizes measurements.
    #[must_use]
    pub fn new(unit: Unit, runs: usize, measured: &[Measured]) -> Self {
        let mut rows: Vec<Row> = Vec::new();
        for mut row in measured.iter().filter(|of| of.failure.is_none()).filter_map(Row::new) {
            let one = rows.iter().rfind(|row| row.machines == 1).filter(|_| row.machines > 1);
            row.times_one =
                one.map(|one| row.total.median.saturating_mul(1000) / one.total.median.max(1));
            rows.push(row);
        }
        let missing = measured
            .iter()
            .filter_map(|of| Some(Missing { name: of.name.clone(), why: of.failure.clone()? }));
        Self { unit, runs, rows, missing: missing.collect() }
    }

    /// Formats the report as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let (unit, _) = self.unit.shown();
        let number = |value: u64| self.unit.figure(value);
        let cell = |figure: Option<&Figure>| figure.map_or("-".to_owned(), |f| number(f.median));
        let stages = Stage::ALL.map(|stage| {
            let of =
                |row: &Row| cell(row.stages.iter().find(|(at, _)| *at == stage).map(|(_, f)| f));
            (stage.as_str().to_owned(), self.rows.iter().map(of).collect::<Vec<_>>())
        });
        let column = |title: &str, of: &dyn Fn(&Row) -> String| {
            (title.to_owned(), self.rows.iter().map(of).collect::<Vec<_>>())
        };
        let mut columns = vec![column("", &|row| row.name.clone())];
        columns.extend(stages);
        columns.push(column("user", &|row| number(row.user.median)));
        columns.push(column("sys", &|row| number(row.system.median)));
        columns.push(column("total", &|row| number(row.total.median)));
        columns.push(column("spread", &|row| {
            let part = row.total.spread.saturating_mul(1000) / row.total.median.max(1);
            format!("{}.{} %", part / 10, part % 10)
        }));
        columns.push(column("memory", &|row| {
            row.memory_kib.map_or("-".to_owned(), |kib| format!("{} MiB", mebibytes(kib)))
        }));
        let mut text = format!(
            "{unit}, median of {}: stages since exec, then the work of the whole process\n{}",
            self.runs,
            lay_out(&columns)
        );
        for row in &self.rows {
            if let Some(times) = row.times_one {
                // Writing to a string does not fail.
                let _ = writeln!(
                    text,
                    "{}: {} times the work of one",
                    row.name,
                    scaled(times, 1000, 2)
                );
            }
        }
        for Missing { why, .. } in &self.missing {
            // The error begins with the name.
            let _ = writeln!(text, "missing: {}", why.replace('\n', "\n    "));
        }
        text
    }
}

impl Row {
    fn new(measured: &Measured) -> Option<Self> {
        let figure = |of: &dyn Fn(&Sample) -> Option<u64>| {
            Figure::of(measured.samples.iter().filter_map(of))
        };
        let stages = Stage::ALL
            .into_iter()
            .filter_map(|stage| {
                Some((stage, figure(&|sample| sample.stages.get(&stage).copied())?))
            })
            .collect();
        Some(Self {
            name: measured.name.clone(),
            machines: measured.machines,
            times_one: None,
            stages,
            user: figure(&|sample| Some(sample.user))?,
            system: figure(&|sample| Some(sample.system))?,
            total: figure(&|sample| Some(sample.user + sample.system))?,
            memory_kib: measured.memory_kib,
        })
    }
}

/// Formats KiB as tables show them.
pub(super) fn mebibytes(kib: u64) -> String {
    scaled(kib, 1024, 1)
}

/// Formats a number in another unit, with decimals.
pub(super) fn scaled(value: u64, scale: u32, decimals: usize) -> String {
    #[expect(clippy::cast_precision_loss, reason = "a few digits of it are shown")]
    let value = value as f64 / f64::from(scale);
    format!("{value:.decimals$}")
}

/// The first column is text, the others are numbers.
fn lay_out(columns: &[(String, Vec<String>)]) -> String {
    let width = |(title, cells): &(String, Vec<String>)| {
        cells.iter().chain([title]).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = columns.iter().map(width).collect();
    let height = columns.first().map_or(0, |(_, cells)| cells.len());
    let mut text = String::new();
    for line in 0..=height {
        let mut row = String::new();
        for (at, ((title, cells), width)) in columns.iter().zip(&widths).enumerate() {
            let cell = if line == 0 { title } else { &cells[line - 1] };
            // Writing to a string does not fail.
            let _ = match at {
                0 => write!(row, "{cell:<width$}"),
                _ => write!(row, "  {cell:>width$}"),
            };
        }
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::Stages;

    pub(crate) fn report() -> Report {
        let sample = |user: u64| Sample {
            stages: Stages::from([(Stage::Run, 8_000_000), (Stage::End, user + 200_000_000)]),
            user,
            system: 150_000_000,
        };
        let firn = Measured {
            name: "firn".to_owned(),
            machines: 1,
            samples: [450_000_000, 449_000_000, 480_000_000].map(sample).into(),
            memory_kib: Some(5300),
            failure: None,
        };
        let three = Measured {
            name: "firn: 3 at once".to_owned(),
            machines: 3,
            samples: vec![sample(1_710_000_000)],
            memory_kib: None,
            failure: None,
        };
        let other = Measured {
            name: "another <one>".to_owned(),
            machines: 1,
            samples: vec![sample(1_000_000_000)],
            memory_kib: None,
            failure: None,
        };
        let none = Measured {
            name: "none".to_owned(),
            machines: 1,
            samples: vec![sample(1)],
            memory_kib: None,
            failure: Some("none: it hangs:\nno output".to_owned()),
        };
        Report::new(Unit::Instructions, 3, &[firn, three, other, none])
    }

    #[test]
    fn the_table_has_medians() {
        let expected = "\
1e9 instructions, median of 3: stages since exec, then the work of the whole process
                 first entry  kernel  init  agent    end   user    sys  total  spread   memory
firn                   0.008       -     -      -  0.650  0.450  0.150  0.600   5.1 %  5.2 MiB
firn: 3 at once        0.008       -     -      -  1.910  1.710  0.150  1.860   0.0 %        -
another <one>          0.008       -     -      -  1.200  1.000  0.150  1.150   0.0 %        -
firn: 3 at once: 3.10 times the work of one
missing: none: it hangs:
    no output
";
        assert_eq!(report().table(), expected);
    }

    #[test]
    fn programs_get_everything() {
        let json = serde_json::to_value(report()).expect("it is plain data");
        assert_eq!(json["unit"], "instructions");
        assert_eq!(json["rows"][0]["total"]["spread"], 31_000_000);
        assert_eq!(json["rows"][0]["stages"][0][0], "run");
        assert_eq!(json["rows"][1]["times_one"], 3100);
        assert_eq!(json["missing"][0]["name"], "none");
    }
}
