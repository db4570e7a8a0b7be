//! A bar chart of a report; shorter bars are better.

use std::io::{self, Cursor};

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::report::{Column, Figure, Report, Row, Unit};

/// Widths in pixels: of the names, of the longest bar, of the numbers after the bars.
const NAMES: u64 = 250;
const BARS: u64 = 460;
const NUMBERS: u64 = 90;
/// Heights in pixels: of the heading, of a group's heading, of a bar, from bar to bar.
const HEADING: u64 = 64;
const GROUP: u64 = 30;
const BAR: u64 = 22;
const STEP: u64 = 34;
/// The same where there are groups.
const THIN_BAR: u64 = 14;
const THIN_STEP: u64 = 18;

/// What firn does, and what others do; or the parts of a sum. Blue and orange suit colour-blind readers.
const FIRN: &str = "#2b6cb0";
const OTHERS: &str = "#dd8b1f";

type Svg = Writer<Cursor<Vec<u8>>>;

impl Report {
    /// Draws an SVG chart: of the column that is a sum, a bar in two parts for each row, of several machines at once
    /// what one of them took; otherwise a group of bars for each column, whose longest bar is the slowest.
    ///
    /// # Errors
    /// None in practice: it writes to memory.
    pub fn chart(&self) -> io::Result<String> {
        match self.whole().and_then(|whole| Some((whole, whole.parts.first()?))) {
            Some((whole, first)) => self.sums(whole, first),
            None => self.groups(),
        }
    }

    fn sums(&self, whole: &Column, first: &str) -> io::Result<String> {
        let part = |row: &Row, name: &str| {
            let figure = row.figures.get(name)?;
            Some(figure.value / u64::from(row.machines.max(1)))
        };
        let rows: Vec<_> = self
            .rows
            .iter()
            .filter_map(|row| Some((row, part(row, first)?, part(row, &whole.name)?)))
            .collect();
        let longest = rows.iter().map(|(.., total)| *total).max().unwrap_or(1).max(1);
        let each = match rows.iter().any(|(row, ..)| row.machines > 1) {
            true => ", for each machine",
            false => "",
        };
        let title = format!("{}, in {}{each}: less is better", self.title, self.unit().shown());
        let legend = [(12, FIRN, "guest and monitor"), (190, OTHERS, "the host's kernel")];
        draw(&title, &legend, HEADING + STEP * count(&rows), |writer| {
            for ((row, user, total), top) in rows.iter().zip((0..).map(|at| HEADING + STEP * at)) {
                let length = |value: u64| value * BARS / longest;
                let baseline = top + BAR * 3 / 4;
                text(writer, (NAMES - 10, baseline), "end", &row.name)?;
                rect(writer, (NAMES, top), (length(*user), BAR), FIRN)?;
                let rest = length(*total).saturating_sub(length(*user));
                rect(writer, (NAMES + length(*user), top), (rest, BAR), OTHERS)?;
                let number = (NAMES + length(*total) + 8, baseline);
                text(writer, number, "start", &number_of(whole.unit, *total))?;
            }
            Ok(())
        })
    }

    fn groups(&self) -> io::Result<String> {
        let bars = |column: &Column| -> Vec<(&Row, Figure)> {
            let figure = |row| Some((row, *Row::figure(row, column)?));
            self.rows.iter().filter_map(figure).collect()
        };
        let groups: Vec<_> = self.columns.iter().map(|column| (column, bars(column))).collect();
        let height = |bars: &[(&Row, Figure)]| GROUP + THIN_STEP * count(bars);
        let all = groups.iter().map(|(_, bars)| height(bars)).sum::<u64>() + HEADING;
        let title = format!("{}, in {}: less is better", self.title, self.unit().shown());
        draw(&title, &[(12, FIRN, "firn"), (110, OTHERS, "others")], all, |writer| {
            let mut top = HEADING;
            for (column, bars) in &groups {
                let longest = bars.iter().map(|(_, figure)| figure.value).max().unwrap_or(1).max(1);
                text(writer, (NAMES, top + GROUP - 12), "start", &column.name)?;
                let tops = (0..).map(|at| top + GROUP + THIN_STEP * at);
                for ((row, Figure { value, .. }), top) in bars.iter().zip(tops) {
                    let (length, baseline) = (value * BARS / longest, top + THIN_BAR - 2);
                    let colour = if row.reference { OTHERS } else { FIRN };
                    text(writer, (NAMES - 10, baseline), "end", &row.name)?;
                    rect(writer, (NAMES, top), (length.max(1), THIN_BAR), colour)?;
                    let number = number_of(column.unit, *value);
                    text(writer, (NAMES + length + 8, baseline), "start", &number)?;
                }
                top += height(bars);
            }
            Ok(())
        })
    }
}

impl Row {
    fn figure(&self, column: &Column) -> Option<&Figure> {
        self.figures.get(&column.name)
    }
}

fn count<T>(rows: &[T]) -> u64 {
    rows.len() as u64
}

fn number_of(unit: Unit, value: u64) -> String {
    match unit {
        Unit::Instructions => super::report::scaled(value, 1_000_000_000, 2),
        Unit::Nanoseconds | Unit::Kib => unit.figure(value),
    }
}

fn draw(
    title: &str,
    legend: &[(u64, &str, &str)],
    height: u64,
    bars: impl FnOnce(&mut Svg) -> io::Result<()>,
) -> io::Result<String> {
    let size = (NAMES + BARS + NUMBERS, height);
    let (width, height) = (size.0.to_string(), size.1.to_string());
    let mut writer = Writer::new_with_indent(Cursor::new(Vec::new()), b' ', 1);
    writer
        .create_element("svg")
        .with_attributes([
            ("xmlns", "http://www.w3.org/2000/svg"),
            ("width", &*width),
            ("height", &*height),
            ("font-family", "sans-serif"),
            ("font-size", "14"),
        ])
        .write_inner_content(|writer| {
            rect(writer, (0, 0), size, "#ffffff")?;
            text(writer, (12, 24), "start", title)?;
            for (at, colour, what) in legend {
                rect(writer, (*at, 38), (12, 12), colour)?;
                text(writer, (at + 18, 49), "start", what)?;
            }
            bars(writer)
        })?;
    String::from_utf8(writer.into_inner().into_inner()).map_err(io::Error::other)
}

fn rect(writer: &mut Svg, at: (u64, u64), size: (u64, u64), fill: &str) -> io::Result<()> {
    let [x, y, width, height] = [at.0, at.1, size.0, size.1].map(|number| number.to_string());
    let attributes =
        [("x", &*x), ("y", &y), ("width", &width), ("height", &height), ("fill", fill)];
    writer.create_element("rect").with_attributes(attributes).write_empty().map(drop)
}

fn text(writer: &mut Svg, at: (u64, u64), anchor: &str, text: &str) -> io::Result<()> {
    let (x, y) = (at.0.to_string(), at.1.to_string());
    let attributes = [("x", &*x), ("y", &y), ("text-anchor", anchor)];
    let element = writer.create_element("text").with_attributes(attributes);
    element.write_text_content(BytesText::new(text)).map(drop)
}

#[cfg(test)]
mod tests {
    use crate::report::tests::{report, steps};

    #[track_caller]
    fn has(svg: &str, parts: &[&str]) {
        for part in parts {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
    }

    #[test]
    fn bars_are_as_long_as_what_they_stand_for() {
        let mut one = report();
        one.rows.retain(|row| row.machines == 1);
        let svg = one.chart().expect("memory can be written");
        // 1.15 is the longest; firn's bar is 0.6.
        let parts = [
            r##"<rect x="250" y="64" width="180" height="22" fill="#2b6cb0"/>"##,
            r##"<rect x="430" y="64" width="60" height="22" fill="#dd8b1f"/>"##,
            r##"<rect x="250" y="98" width="400" height="22" fill="#2b6cb0"/>"##,
            "exec to exit, in 1e9 instructions: less is better</text>",
            ">another &lt;one&gt;</text>",
            ">0.60</text>",
        ];
        has(&svg, &parts);
    }

    #[test]
    fn of_several_machines_it_is_one_that_counts() {
        let svg = report().chart().expect("memory can be written");
        has(
            &svg,
            &[
                ", for each machine: less is better</text>",
                ">firn: 3 at once</text>",
                ">0.62</text>",
            ],
        );
    }

    #[test]
    fn each_step_has_bars_of_its_own() {
        let svg = steps([10, 12, 15], [40, 41, 42]).chart().expect("memory can be written");
        let parts = [
            "The store, in ms: less is better</text>",
            r##"<rect x="250" y="94" width="115" height="14" fill="#2b6cb0"/>"##,
            r##"<rect x="250" y="112" width="460" height="14" fill="#dd8b1f"/>"##,
            r##"<rect x="250" y="160" width="115" height="14" fill="#2b6cb0"/>"##,
            ">find</text>",
            ">400.0</text>",
        ];
        has(&svg, &parts);
    }
}
