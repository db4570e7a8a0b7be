//! Reports of measurements, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::Measured;

/// What repeated measurements come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    /// The median or the least, as [`Report::of`] says.
    pub value: u64,
    /// The difference between the largest and the smallest; of the least, that between it and the median.
    pub spread: u64,
    /// The number of measurements.
    pub runs: usize,
}

/// What counts of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Summary {
    /// The median, where nothing else disturbs.
    Median,
    /// The least, where whatever else the host does only adds to it.
    Best,
}

impl Summary {
    fn as_str(self) -> &'static str {
        match self {
            Self::Median => "median",
            Self::Best => "best",
        }
    }

    /// Summarizes at least one value.
    fn of(self, mut values: Vec<u64>) -> Option<Figure> {
        values.sort_unstable();
        let (least, greatest, runs) = (*values.first()?, *values.last()?, values.len());
        let median = values[runs / 2];
        Some(match self {
            Self::Median => Figure { value: median, spread: greatest - least, runs },
            Self::Best => Figure { value: least, spread: median - least, runs },
        })
    }
}

/// The unit of a column's figures. Less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Executed instructions.
    Instructions,
    /// Nanoseconds.
    Nanoseconds,
    /// Memory in KiB.
    Kib,
}

impl Unit {
    /// The unit in tables: 1e9 instructions, milliseconds, or MiB.
    #[must_use]
    pub fn shown(self) -> &'static str {
        match self {
            Self::Instructions => "1e9 instructions",
            Self::Nanoseconds => "ms",
            Self::Kib => "MiB",
        }
    }

    /// A figure as tables show it.
    pub(super) fn figure(self, value: u64) -> String {
        match self {
            Self::Instructions => scaled(value, 1_000_000_000, 3),
            Self::Nanoseconds => scaled(value, 1_000_000, 1),
            Self::Kib => scaled(value, 1024, 1),
        }
    }
}

/// One of the figures that each row has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Its heading.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// The columns that it is the sum of. If there is such a column, it is what the chart shows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
}

impl Column {
    /// One of times or instructions that is no sum.
    #[must_use]
    pub fn new(name: &str, unit: Unit) -> Self {
        Self { name: name.to_owned(), unit, parts: Vec::new() }
    }
}

/// All figures of a benchmark.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Names its files.
    pub subject: String,
    /// What was measured, in words.
    pub title: String,
    /// What counts of several runs.
    pub of: Summary,
    /// The number of runs of each row.
    pub runs: usize,
    /// What the rows have figures of. The unit of the first is the report's.
    pub columns: Vec<Column>,
    /// A row for each way that was measured.
    pub rows: Vec<Row>,
    /// The ways without figures.
    pub missing: Vec<Missing>,
}

/// A way without figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Missing {
    /// Its name: the guest and the monitor.
    pub name: String,
    /// Why it was abandoned.
    pub why: String,
}

/// The figures of one way to do what is measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Its name: the guest and the monitor.
    pub name: String,
    /// How many machines at once.
    pub machines: u8,
    /// With more than one, the ratio of the work to that of one, in thousandths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub times_one: Option<u64>,
    /// Whether it is none of firn's: its times tell how fast the host was.
    pub reference: bool,
    /// By the names of columns.
    pub figures: BTreeMap<String, Figure>,
}

impl Report {
    /// Summarizes measurements. Columns are those of the samples, in their order, if there are none.
    #[must_use]
    pub fn new(
        (subject, title): (&str, &str),
        of: Summary,
        mut columns: Vec<Column>,
        runs: usize,
        measured: &[Measured],
    ) -> Self {
        if columns.is_empty() {
            for (name, _) in measured.iter().flat_map(|of| of.samples.iter().flatten()) {
                if columns.iter().all(|column| column.name != *name) {
                    columns.push(Column::new(name, Unit::Nanoseconds));
                }
            }
        }
        let mut rows: Vec<Row> = Vec::new();
        for measured in measured.iter().filter(|of| of.failure.is_none()) {
            let mut row = Row::new(of, &columns, measured);
            let total = |row: &Row| Some(row.figures.get(&whole(&columns)?.name)?.value);
            let is_one = |one: &&Row| one.machines == 1 && row.name.starts_with(&one.name);
            let one = rows.iter().rfind(is_one).filter(|_| row.machines > 1);
            row.times_one =
                one.and_then(|one| Some(total(&row)?.saturating_mul(1000) / total(one)?.max(1)));
            rows.push(row);
        }
        let missing = measured
            .iter()
            .filter_map(|of| Some(Missing { name: of.name.clone(), why: of.failure.clone()? }));
        let missing = missing.collect();
        Self {
            subject: subject.to_owned(),
            title: title.to_owned(),
            of,
            runs,
            columns,
            rows,
            missing,
        }
    }

    /// The unit of most figures.
    #[must_use]
    pub fn unit(&self) -> Unit {
        self.columns.first().map_or(Unit::Nanoseconds, |column| column.unit)
    }

    /// The column that is the sum of others, if one is.
    #[must_use]
    pub fn whole(&self) -> Option<&Column> {
        whole(&self.columns)
    }

    /// Formats the report as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let names = self.rows.iter().map(|row| row.name.clone()).collect();
        let mut columns: Vec<(String, Vec<String>)> = vec![(String::new(), names)];
        for column in &self.columns {
            let suffix = match column.unit == self.unit() {
                true => String::new(),
                false => format!(" {}", column.unit.shown()),
            };
            let cell = |row: &Row| match row.figures.get(&column.name) {
                Some(figure) => column.unit.figure(figure.value) + &suffix,
                None => "-".to_owned(),
            };
            columns.push((column.name.clone(), self.rows.iter().map(cell).collect()));
        }
        let spreads = self.rows.iter().map(|row| {
            let part = self.spread(row);
            format!("{}.{} %", part / 10, part % 10)
        });
        columns.push(("spread".to_owned(), spreads.collect()));
        let (unit, of) = (self.unit().shown(), self.of.as_str());
        let mut text =
            format!("{}: {unit}, {of} of {}\n{}", self.title, self.runs, lay_out(&columns));
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

    /// How far a row's runs lie apart, in thousandths: of the sum of its figures if there is one, else the median of all.
    fn spread(&self, row: &Row) -> u64 {
        let part = |figure: &Figure| figure.spread.saturating_mul(1000) / figure.value.max(1);
        if let Some(whole) = self.whole() {
            return row.figures.get(&whole.name).map_or(0, part);
        }
        let mut parts: Vec<u64> = row.figures.values().map(part).collect();
        parts.sort_unstable();
        parts.get(parts.len() / 2).copied().unwrap_or(0)
    }
}

fn whole(columns: &[Column]) -> Option<&Column> {
    columns.iter().find(|column| !column.parts.is_empty())
}

impl Row {
    fn new(of: Summary, columns: &[Column], measured: &Measured) -> Self {
        let figure = |column: &Column| {
            let samples = measured.samples.iter().flatten();
            let values = samples.filter(|(name, _)| *name == column.name).map(|(_, value)| *value);
            Some((column.name.clone(), of.of(values.collect())?))
        };
        Self {
            name: measured.name.clone(),
            machines: measured.machines,
            times_one: None,
            reference: measured.reference,
            figures: columns.iter().filter_map(figure).collect(),
        }
    }
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
    use crate::{Sample, boot};

    fn measured(name: &str, machines: u8, samples: Vec<Sample>) -> Measured {
        let (name, reference) = (name.to_owned(), !name.starts_with("firn"));
        Measured { name, machines, reference, samples, failure: None }
    }

    pub(crate) fn report() -> Report {
        let sample = |user: u64| -> Sample {
            [
                ("first entry", 8_000_000),
                ("end", user + 200_000_000),
                ("user", user),
                ("sys", 150_000_000),
                ("total", user + 150_000_000),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
        };
        let mut firn: Vec<_> = [450_000_000, 449_000_000, 480_000_000].map(sample).into();
        let memory = [("memory", 5300), ("private", 4100), ("written", 900)];
        firn[0].extend(memory.map(|(name, kib)| (name.to_owned(), kib)));
        let measured = [
            measured("firn", 1, firn),
            measured("firn: 3 at once", 3, vec![sample(1_710_000_000)]),
            measured("another <one>", 1, vec![sample(1_000_000_000)]),
            Measured {
                failure: Some("none: it hangs:\nno output".to_owned()),
                ..measured("none", 1, vec![sample(1)])
            },
        ];
        boot::report(Unit::Instructions, 3, &measured)
    }

    /// Two ways and one that failed, in steps; times are those of the host.
    pub(crate) fn steps(firn: [u64; 3], other: [u64; 3]) -> Report {
        let samples = |times: [u64; 3]| -> Vec<Sample> {
            let sample = |ms: u64| {
                [("find", ms), ("read", ms * 10)]
                    .map(|(name, ms)| (name.to_owned(), ms * 1_000_000))
            };
            times.map(|ms| sample(ms).into()).into()
        };
        let measured = [measured("firn", 1, samples(firn)), measured("other", 1, samples(other))];
        Report::new(("store", "The store"), Summary::Best, Vec::new(), 3, &measured)
    }

    #[test]
    fn the_table_has_medians() {
        let expected = "\
A boot from exec to exit: 1e9 instructions, median of 3
                 first entry  kernel  init  agent    end   user    sys  total   memory  private  written  spread
firn                   0.008       -     -      -  0.650  0.450  0.150  0.600  5.2 MiB  4.0 MiB  0.9 MiB   5.1 %
firn: 3 at once        0.008       -     -      -  1.910  1.710  0.150  1.860        -        -        -   0.0 %
another <one>          0.008       -     -      -  1.200  1.000  0.150  1.150        -        -        -   0.0 %
firn: 3 at once: 3.10 times the work of one
missing: none: it hangs:
    no output
";
        assert_eq!(report().table(), expected);
    }

    #[test]
    fn or_what_was_best_of_any_steps() {
        let expected = "\
The store: ms, best of 3
       find   read  spread
firn   10.0  100.0  20.0 %
other  30.0  300.0  10.0 %
";
        assert_eq!(steps([12, 10, 15], [40, 30, 33]).table(), expected);
    }

    #[test]
    fn programs_get_everything() {
        let json = serde_json::to_value(report()).expect("it is plain data");
        assert_eq!(json["columns"][0]["unit"], "instructions");
        assert_eq!(json["rows"][0]["figures"]["total"]["spread"], 31_000_000);
        assert_eq!(json["rows"][0]["figures"]["first entry"]["runs"], 3);
        assert_eq!(json["rows"][1]["times_one"], 3100);
        assert_eq!(json["missing"][0]["name"], "none");
    }
}
