//! `firn doctor`.

use std::io::{self, Write};
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use firn::error::chain;
use firn::kit::KitName;
use firn::log::colours_wanted;
use firn::ocr::Reader;
use firn_vmm::probe;

use super::python;

/// Show what this host can do and what is missing
///
/// Prints a line each for KVM, the carrier, the guest kits, Python and OCR. Exits with 0 only if tests can run.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// The program that emulates the carrier.
const QEMU: &str = "qemu-system-x86_64";

/// The state of one part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Grade {
    Good,
    /// Missing, but tests can run without it.
    Warn,
    Bad,
}

/// A line of the report.
struct Finding {
    what: &'static str,
    grade: Grade,
    text: String,
}

pub(super) fn run(_args: &Args) -> Result<ExitCode> {
    let kvm = probe::kvm();
    let (kvm_works, carrier) = (kvm.usable(), carrier_finding(kvm.usable()));
    let able = kvm_works || carrier.grade == Grade::Good;
    let kvm = Finding {
        what: "kvm",
        grade: if kvm_works {
            Grade::Good
        } else if able {
            Grade::Warn
        } else {
            Grade::Bad
        },
        text: kvm.to_string(),
    };
    let findings = [kvm, carrier, kit_finding(), python_finding(), ocr_finding()];
    let ready = findings.iter().all(|finding| finding.grade != Grade::Bad);
    print(&mut io::stdout().lock(), &findings, ready, kvm_works, colours_wanted(&io::stdout()))?;
    Ok(if ready { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn carrier_finding(needless: bool) -> Finding {
    let missing = if needless { Grade::Warn } else { Grade::Bad };
    let qemu = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path).map(|dir| dir.join(QEMU)).find(|file| file.is_file())
    });
    let (grade, text) = match (qemu, firn_kits::lookup(KitName::Carrier)) {
        (None, _) => {
            (missing, format!("{QEMU} is not in PATH: install Debian's package qemu-system-x86"))
        }
        (Some(_), Ok(None)) => {
            (missing, "its kernel is not built: run `firn kit build carrier`".to_owned())
        }
        (Some(_), Err(error)) => (missing, chain(&error)),
        (Some(qemu), Ok(Some(kit))) => {
            (Grade::Good, format!("{}, Linux {}", qemu.display(), kit.manifest.kernel_release))
        }
    };
    Finding { what: "carrier", grade, text }
}

fn kit_finding() -> Finding {
    let mut grade = Grade::Good;
    let mut texts = Vec::new();
    for kit in KitName::GUESTS {
        let name = kit.as_str();
        let (found, text) = match firn_kits::lookup(kit) {
            Ok(Some(kit)) => {
                (Grade::Good, format!("{name}, Linux {}", kit.manifest.kernel_release))
            }
            Ok(None) => (Grade::Bad, format!("{name} is not built: run `firn kit build {name}`")),
            Err(error) => (Grade::Bad, chain(&error)),
        };
        // Machines boot the others only if their test says so.
        if found != Grade::Good && grade != Grade::Bad {
            grade = if kit == KitName::Micro { found } else { Grade::Warn };
        }
        texts.push(text);
    }
    Finding { what: "kit", grade, text: texts.join("; ") }
}

fn python_finding() -> Finding {
    let (grade, text) = match python::find() {
        Ok(python) => (Grade::Good, format!("{} ({})", python.version, python.path.display())),
        Err(error) => (Grade::Bad, chain(error.as_ref())),
    };
    Finding { what: "python", grade, text }
}

fn ocr_finding() -> Finding {
    let (grade, text) = match Reader::find() {
        Ok(reader) => (Grade::Good, reader.program().display().to_string()),
        Err(error) => (Grade::Warn, format!("scripts cannot read screens: {error}")),
    };
    Finding { what: "ocr", grade, text }
}

fn print(
    out: &mut impl Write,
    findings: &[Finding],
    ready: bool,
    kvm: bool,
    colours: bool,
) -> io::Result<()> {
    for Finding { what, grade, text } in findings {
        let (word, colour) = match grade {
            Grade::Good => ("ok", AnsiColor::Green),
            Grade::Warn => ("no", AnsiColor::Yellow),
            Grade::Bad => ("MISSING", AnsiColor::Red),
        };
        let style = if colours { colour.on_default() } else { Style::new() };
        writeln!(out, "{what:<8} {style}{word:<8}{style:#} {}", text.replace('\n', " "))?;
    }
    let verdict = match (ready, kvm) {
        (true, true) => "tests can run, on KVM",
        (true, false) => "tests can run, in the carrier",
        (false, _) => "tests cannot run yet",
    };
    writeln!(out, "{:<17} {verdict}", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_each_and_aligned() {
        let finding = |what, grade| Finding { what, grade, text: format!("about\n{what}") };
        let findings = [
            finding("kvm", Grade::Warn),
            finding("carrier", Grade::Good),
            finding("kit", Grade::Bad),
        ];
        let mut out = Vec::new();
        print(&mut out, &findings, false, false, false).expect("a vector takes all");
        let text = String::from_utf8(out).expect("only text was printed");
        let expected = "kvm      no       about kvm\ncarrier  ok       about carrier\nkit      MISSING  about kit\n";
        assert_eq!(text, format!("{expected}{:18}tests cannot run yet\n", ""));
    }

    #[test]
    fn colours_do_not_disturb_the_columns() {
        let findings = [Finding { what: "kit", grade: Grade::Good, text: "x".into() }];
        let mut out = Vec::new();
        print(&mut out, &findings, true, true, true).expect("a vector takes all");
        let text = String::from_utf8(out).expect("only text was printed");
        assert!(text.starts_with("kit      \x1b[32mok      \x1b[0m x\n"), "{text:?}");
    }
}
