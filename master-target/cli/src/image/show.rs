//! What people and programs are shown of images.

use std::io::{BufWriter, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Context;
use backhaul_disk_image::ops::{self, CompareReport, ConvertReport, MapTotals, RepairPlan};
use backhaul_disk_image::{CheckReport, ImageInfo, MapDisk, Run, RunState, Severity};
use bytesize::ByteSize;
use comfy_table::{Cell, Color};
use serde_json::json;

use crate::print::say;
use crate::show::{Output, failure};

/// Runs, findings and extents that are shown; `--json` has all of them.
pub(super) const ROWS_MAX: usize = 100;

fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

pub(crate) fn counted(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

impl Output {
    pub(crate) fn image_info(&self, info: &ImageInfo) {
        if self.is_json() {
            return self.json(info);
        }
        let mut next = Some(info);
        while let Some(info) = next {
            say!("image       {}", info.path.display());
            let thin = if info.thin { ", thin" } else { "" };
            say!("kind        {}{thin}", info.kind);
            say!("disk        {} ({} bytes)", size(info.size_bytes), info.size_bytes);
            say!("stored      {}", size(info.stored_bytes));
            for (name, value) in [
                ("content id", &info.content_id),
                ("parent's   ", &info.parent_content_id),
                ("uuid", &info.uuid),
                ("adapter", &info.adapter),
                ("hardware", &info.hardware_version),
            ] {
                if let Some(value) = value {
                    say!("{name:<11} {value}");
                }
            }
            for extent in info.extents.iter().take(ROWS_MAX) {
                let path = extent.path.as_ref().map(|path| path.display().to_string());
                let unclean = if extent.unclean { ", not closed by its last writer" } else { "" };
                say!(
                    "extent      {} {} {}{unclean}",
                    extent.format,
                    size(extent.length_bytes),
                    path.unwrap_or_default()
                );
            }
            let more = info.extents.len().saturating_sub(ROWS_MAX);
            if more > 0 {
                say!("extent      and {more} more; --json has all of them");
            }
            for finding in &info.findings {
                say!("finding     {}", finding.sentence);
            }
            next = info.parent.as_deref();
            if next.is_some() {
                say!("");
            }
        }
    }

    pub(crate) fn checked(&self, report: &CheckReport) {
        if self.is_json() {
            return self.json(report);
        }
        if !report.findings.is_empty() {
            let mut table = self.table(&["severity", "file", "at", "what"]);
            for finding in report.findings.iter().take(ROWS_MAX) {
                let (word, colour) = match finding.severity {
                    Severity::Note => ("note", Color::Reset),
                    Severity::Leak => ("leak", Color::Yellow),
                    Severity::Redundancy => ("one copy", Color::Yellow),
                    Severity::Loss => ("loss", Color::Red),
                };
                table.add_row(vec![
                    self.cell(word, colour),
                    Cell::new(finding.path.display()),
                    Cell::new(finding.offset.map_or(String::new(), |at| at.to_string())),
                    Cell::new(&finding.sentence),
                ]);
            }
            say!("{table}");
        }
        if report.grains_total > 0 {
            let share = report.grains_allocated as f64 * 100.0 / report.grains_total as f64;
            say!("{share:.1} % of {} grains are allocated", report.grains_total);
        }
        if report.is_clean() {
            say!("no damage was found");
        } else {
            say!(
                "{}, {} where only one copy is good, {} leaked; see `backhaul image repair`",
                counted(report.losses, "loss", "losses"),
                counted(report.redundancies, "place", "places"),
                size(report.leaked_bytes)
            );
        }
    }

    /// Tells the runs as they are found, so that the memory it takes does not grow with them. An
    /// error in the middle takes the place of the totals.
    pub(crate) fn map_json(&self, image: &dyn MapDisk) -> anyhow::Result<ExitCode> {
        let mut out = BufWriter::new(std::io::stdout().lock());
        let written = write_map(image, &mut out).and_then(|code| {
            out.flush()?;
            Ok(code)
        });
        match written {
            // Whoever read this went away.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
            written => written.context("cannot print the map"),
        }
    }

    pub(crate) fn mapped(&self, runs: &[Run], totals: &MapTotals) {
        let mut table = self.table(&["offset", "length", "state"]);
        for run in runs.iter().take(ROWS_MAX) {
            let state = match run.state {
                RunState::Data => self.cell("data", Color::Green),
                RunState::Zero => Cell::new("zero"),
                RunState::Unallocated => Cell::new("unallocated"),
            };
            table.add_row(vec![Cell::new(run.offset), Cell::new(run.length), state]);
        }
        say!("{table}");
        let more = totals.runs.saturating_sub(ROWS_MAX as u64);
        if more > 0 {
            say!("and {more} more; --json has all of them");
        }
        say!(
            "data {}, zero {}, unallocated {}",
            size(totals.data_bytes),
            size(totals.zero_bytes),
            size(totals.unallocated_bytes)
        );
    }

    pub(crate) fn converted(&self, report: &ConvertReport) {
        if self.is_json() {
            return self.json(report);
        }
        say!(
            "{} is a {} image of {}, of which {} are data",
            report.path.display(),
            report.kind,
            size(report.size_bytes),
            size(report.written_bytes)
        );
        if report.padding_bytes > 0 {
            say!(
                "{} zero bytes were added at its end: Azure takes whole MiB only",
                report.padding_bytes
            );
        }
        if let Some(caution) = report.caution {
            say!("{caution}");
        }
        for finding in report.findings.iter().take(ROWS_MAX) {
            let path = finding.path.display().to_string();
            let sentence = &finding.sentence;
            let place = if sentence.starts_with(&path) { String::new() } else { path + ": " };
            eprintln!("{place}{sentence}; see `backhaul image check`");
        }
        let more = report.findings.len().saturating_sub(ROWS_MAX);
        if more > 0 {
            eprintln!("and {more} more places are damaged; --json has all of them");
        }
    }

    pub(crate) fn compared(&self, report: &CompareReport) {
        if self.is_json() {
            return self.json(report);
        }
        match (report.first_difference, report.size_bytes) {
            (Some(at), _) => say!("the disks differ, first at byte {at}"),
            (None, [one, other]) if one != other => {
                say!(
                    "the disks are equal, and the longer one ends in {} zeros",
                    one.abs_diff(other)
                );
            }
            (None, _) => say!("the disks are equal"),
        }
    }

    pub(crate) fn plan(&self, plan: &RepairPlan) {
        if let Some(sentence) = &plan.cannot_open {
            say!("it cannot be opened: {sentence}");
        }
        let mut table = self.table(&["file", "fix", "bytes lost"]);
        for fix in plan.fixes.iter().take(ROWS_MAX) {
            table.add_row(vec![
                Cell::new(fix.path.display()),
                Cell::new(&fix.sentence),
                Cell::new(match fix.freed_bytes {
                    0 => fix.lost_bytes.to_string(),
                    freed => format!("at most {}", fix.lost_bytes + freed),
                }),
            ]);
        }
        say!("{table}");
        if plan.fixes.len() > ROWS_MAX {
            say!("and {} more", plan.fixes.len() - ROWS_MAX);
        }
        let fixes = counted(plan.fixes.len() as u64, "fix", "fixes");
        let lost = size(plan.lost_bytes);
        match plan.freed_bytes {
            0 => say!("{fixes}; {lost} of the disk are lost"),
            freed => say!(
                "{fixes}; {lost} of what the tables name are lost, and what is given back may hold {freed} \
                 bytes of the disk"
            ),
        }
    }
}

fn write_map(image: &dyn MapDisk, out: &mut impl Write) -> std::io::Result<ExitCode> {
    write!(out, "{{\"runs\":[")?;
    let (mut separator, mut said) = ("", Ok(()));
    let walked = ops::map(image, &mut |run| {
        said =
            write!(out, "{separator}").and_then(|()| Ok(serde_json::to_writer(&mut *out, &run)?));
        separator = ",";
        said.is_ok()
    });
    said?;
    let (name, value, code) = match walked {
        Ok(totals) => ("totals", json!(totals), ExitCode::SUCCESS),
        Err(error) => ("error", failure("failed", &error.to_string()), ExitCode::FAILURE),
    };
    writeln!(out, "],\"{name}\":{value}}}")?;
    Ok(code)
}
