//! The log as an XML file: `nest` for each step with its `head`, `line` for each line.
//!
//! Steps of several threads may end in another order than they nest; the file then shows them nested as they began.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use quick_xml::Writer;
use quick_xml::events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event as Xml};

use super::{Event, Level, Sink, finished};

/// The most bytes of the file that a machine's console may take: a guest must not fill the host's disk.
const MAX_CONSOLE: usize = 16 << 20;
/// The size of a line without its text and its machine's name.
const LINE: usize = r#"<line machine="" type="serial"></line>"#.len();

pub(super) struct XmlLog {
    writer: Writer<BufWriter<File>>,
    open: usize,
    /// How many bytes each machine's console has taken.
    consoles: HashMap<String, usize>,
    /// The first error; later writes are not tried.
    error: Option<io::Error>,
}

impl XmlLog {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut writer = Writer::new(BufWriter::new(File::create(path)?));
        writer.write_event(Xml::Decl(BytesDecl::new("1.0", Some("utf-8"), None)))?;
        writer.write_event(Xml::Start(BytesStart::new("logfile")))?;
        Ok(Self { writer, open: 0, consoles: HashMap::new(), error: None })
    }

    fn write(&mut self, event: Event<'_>) -> io::Result<()> {
        match event {
            Event::Message { level, machine, text } => {
                let kind = match level {
                    Level::Error => Some("error"),
                    Level::Warning => Some("warning"),
                    Level::Debug | Level::Info => None,
                };
                text.lines().try_for_each(|line| self.element("line", machine, kind, line))
            }
            Event::Serial { machine, line, .. } => self.serial(machine, line),
            Event::Failure { why } => {
                why.lines().try_for_each(|line| self.element("line", None, Some("error"), line))
            }
            Event::Begin { machine, text, .. } => {
                self.writer.write_event(Xml::Start(BytesStart::new("nest")))?;
                self.open += 1;
                self.element("head", machine, None, text)
            }
            Event::End { machine, text, took, .. } => {
                self.element("line", machine, None, &finished(text, took))?;
                self.close()
            }
        }
    }

    fn serial(&mut self, machine: &str, line: &str) -> io::Result<()> {
        let taken = self.consoles.entry(machine.to_owned()).or_default();
        if *taken > MAX_CONSOLE {
            return Ok(());
        }
        *taken += LINE + machine.len() + BytesText::new(line).len();
        if *taken > MAX_CONSOLE {
            let mib = MAX_CONSOLE >> 20;
            let why = format!("its console has taken {mib} MiB of this log; the rest is left out");
            return self.element("line", Some(machine), Some("warning"), &why);
        }
        self.element("line", Some(machine), Some("serial"), line)
    }

    fn element(
        &mut self,
        name: &str,
        machine: Option<&str>,
        kind: Option<&str>,
        text: &str,
    ) -> io::Result<()> {
        let mut start = BytesStart::new(name);
        start.extend_attributes(machine.map(|machine| ("machine", machine)));
        start.extend_attributes(kind.map(|kind| ("type", kind)));
        self.writer.write_event(Xml::Start(start))?;
        self.writer.write_event(Xml::Text(BytesText::new(&allowed(text))))?;
        self.writer.write_event(Xml::End(BytesEnd::new(name)))
    }

    fn close(&mut self) -> io::Result<()> {
        match self.open.checked_sub(1) {
            Some(open) => {
                self.open = open;
                self.writer.write_event(Xml::End(BytesEnd::new("nest")))
            }
            None => Ok(()),
        }
    }

    fn end(&mut self) -> io::Result<()> {
        while self.open > 0 {
            self.close()?;
        }
        self.writer.write_event(Xml::End(BytesEnd::new("logfile")))?;
        self.writer.get_mut().flush()
    }
}

impl Sink for XmlLog {
    fn take(&mut self, event: Event<'_>) {
        if self.error.is_none() {
            self.error = self.write(event).err();
        }
    }

    fn finish(&mut self) -> io::Result<bool> {
        match self.error.take() {
            Some(error) => Err(error),
            None => self.end().map(|()| false),
        }
    }
}

/// Removes characters that XML 1.0 cannot represent (2.2).
fn allowed(text: &str) -> String {
    let fits = |c: char| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..);
    text.chars().filter(|c| fits(*c)).collect()
}
