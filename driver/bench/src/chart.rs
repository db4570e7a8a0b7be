//! A bar chart of a report; shorter bars are better.

use std::io::{self, Cursor};

use quick_xml::Writer;
use quick_xml::events::BytesText;

use super::report::{Report, Row, scaled};

/// Widths in pixels: of the names, of the longest bar, of the numbers after the bars.
const NAMES: u64 = 250;
const BARS: u64 = 460;
const NUMBERS: u64 = 90;
/// Heights in pixels: of the heading, of a bar, from bar to bar.
const HEADING: u64 = 64;
const BAR: u64 = 22;
const STEP: u64 = 34;

/// The parts of a bar: guest and monitor, and the host's kernel. Blue and orange suit colour-blind readers.
const USER: &str = "#2b6cb0";
const SYSTEM: &str = "#dd8b1f";

impl Report {
    /// Draws an SVG chart of the processor's work.
    ///
    /// # Errors
    /// None in practice: it writes to memory.
    pub fn chart(&self) -> io::Result<String> {
        let (unit, scale) = self.unit.shown();
        // Next to several machines at once, the bars of one would be too short to compare.
        let rows: Vec<&Row> = self.rows.iter().filter(|row| row.machines == 1).collect();
        let longest = rows.iter().map(|row| row.total.median).max().unwrap_or(1).max(1);
        let size = (NAMES + BARS + NUMBERS, HEADING + STEP * (rows.len() as u64));
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
                let title = format!("A boot from exec to exit, in {unit}: less is better");
                text(writer, (12, 24), "start", &title)?;
                for (at, colour, what) in
                    [(12, USER, "guest and monitor"), (190, SYSTEM, "the host's kernel")]
                {
                    rect(writer, (at, 38), (12, 12), colour)?;
                    text(writer, (at + 18, 49), "start", what)?;
                }
                for (row, top) in rows.iter().zip((0..).map(|at| HEADING + STEP * at)) {
                    bar(writer, row, top, |value| value * BARS / longest, &|value| {
                        scaled(value, scale, if scale > 1_000_000 { 2 } else { 0 })
                    })?;
                }
                Ok(())
            })?;
        String::from_utf8(writer.into_inner().into_inner()).map_err(io::Error::other)
    }
}

type Svg = Writer<Cursor<Vec<u8>>>;

fn bar(
    writer: &mut Svg,
    row: &Row,
    top: u64,
    length: impl Fn(u64) -> u64,
    number: &dyn Fn(u64) -> String,
) -> io::Result<()> {
    let (user, total) = (length(row.user.median), length(row.total.median));
    let baseline = top + BAR * 3 / 4;
    text(writer, (NAMES - 10, baseline), "end", &row.name)?;
    rect(writer, (NAMES, top), (user, BAR), USER)?;
    rect(writer, (NAMES + user, top), (total.saturating_sub(user), BAR), SYSTEM)?;
    text(writer, (NAMES + total + 8, baseline), "start", &number(row.total.median))
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
    use crate::report::tests::report;

    #[test]
    fn bars_are_as_long_as_what_they_stand_for() {
        let svg = report().chart().expect("memory can be written");
        // 1.15 is the longest; firn's bar is 0.6.
        for part in [
            r##"<rect x="250" y="64" width="180" height="22" fill="#2b6cb0"/>"##,
            r##"<rect x="430" y="64" width="60" height="22" fill="#dd8b1f"/>"##,
            r##"<rect x="250" y="98" width="400" height="22" fill="#2b6cb0"/>"##,
            ">another &lt;one&gt;</text>",
            ">0.60</text>",
        ] {
            assert!(svg.contains(part), "{part} is not in\n{svg}");
        }
        assert!(!svg.contains("at once"), "{svg}");
    }
}
