//! What people and programs are shown.

mod links;

use std::io::IsTerminal;

use backhaul_agent::probe::Report;
use backhaul_api::{Consistency, Machine, Point, Stage, Status};
use bytesize::ByteSize;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{Cell, Color, ContentArrangement, Table};
use indicatif::ProgressBar;
use serde::Serialize;
use serde_json::json;

use crate::print::say;

/// How a program is told of a failure.
pub(crate) fn failure(code: &str, sentence: &str) -> serde_json::Value {
    json!({ "code": code, "sentence": sentence })
}

/// Where answers go, and in which form.
pub(crate) struct Output {
    json: bool,
    colours: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { json, colours }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    pub(crate) fn json(&self, value: &impl Serialize) {
        match serde_json::to_string(value) {
            Ok(text) => {
                say!("{text}");
            }
            Err(error) => eprintln!("{error}"),
        }
    }

    pub(crate) fn failure(&self, code: &str, sentence: &str) {
        if self.json {
            self.json(&failure(code, sentence));
        } else {
            eprintln!("{sentence}");
        }
    }

    pub(crate) fn table(&self, heads: &[&str]) -> Table {
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED).set_header(heads);
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table
    }

    pub(crate) fn cell(&self, text: impl ToString, colour: Color) -> Cell {
        let cell = Cell::new(text);
        if self.colours { cell.fg(colour) } else { cell }
    }

    pub(crate) fn status(&self, status: &Status) {
        if self.json {
            return self.json(status);
        }
        let agents = match status.agents.as_slice() {
            [] => "none connected".to_owned(),
            agents => agents.join(", "),
        };
        say!("target    {} {}", status.target, status.version);
        say!("listens   {} (up {} s)", status.listen, status.uptime_seconds);
        say!("agents    {agents}");
        say!("machines  {} ({} consistent)", status.machines, status.machines_consistent);
    }

    pub(crate) fn machines(&self, machines: &[Machine]) {
        if self.json {
            return self.json(&machines);
        }
        let heads = ["machine", "agent", "stage", "disks", "RPO", "lag", "journal", "latest point"];
        let mut table = self.table(&heads);
        for machine in machines {
            let latest = machine.points.last().map_or("none", |point| point.id.as_str());
            table.add_row(vec![
                Cell::new(&machine.name),
                if machine.connected {
                    self.cell(&machine.agent, Color::Green)
                } else {
                    self.cell(format!("{} (away)", machine.agent), Color::Red)
                },
                Cell::new(stage(machine)),
                self.consistency(machine),
                Cell::new(machine.rpo_seconds.map_or("–".into(), |rpo| format!("{rpo:.1} s"))),
                Cell::new(ByteSize(machine.lag_bytes).display().iec()),
                Cell::new(ByteSize(machine.journal_bytes).display().iec()),
                Cell::new(latest),
            ]);
        }
        say!("{table}");
        for machine in machines {
            for sentence in [&machine.trouble, &machine.failure] {
                if !sentence.is_empty() {
                    say!("{}: {sentence}", machine.name);
                }
            }
        }
    }

    /// Something that turns while one waits; nothing where nobody looks.
    pub(crate) fn spinner(&self) -> ProgressBar {
        if self.json || !std::io::stderr().is_terminal() {
            return ProgressBar::hidden();
        }
        let spinner = ProgressBar::new_spinner();
        spinner.enable_steady_tick(std::time::Duration::from_millis(100));
        spinner
    }

    pub(crate) fn probe(&self, report: &Report) {
        if self.json {
            return self.json(report);
        }
        let ms = |seconds: f64| format!("{:.1} ms", seconds * 1e3);
        let rate = |bytes: f64| format!("{:.1} Mbit/s", bytes * 8.0 / 1e6);
        say!("target      {} ({})", report.target, report.name);
        for reach in &report.reach {
            match reach.seconds {
                Some(seconds) => {
                    say!("{:<11} reached in {}", reach.transport, ms(seconds));
                }
                None => {
                    say!("{:<11} {}", reach.transport, reach.failure);
                }
            }
        }
        let (least, median) = report.rtt_seconds;
        let (loaded, worst) = report.loaded_rtt_seconds;
        let loaded = format!("{} under load (99 of 100 below {})", ms(loaded), ms(worst));
        say!("round trip  {} at least, {} in the middle, {loaded}", ms(least), ms(median));
        say!("clock       the target's is {:+.3} s from this one", report.clock_skew_seconds);
        if report.mtu_bytes > 0 {
            let of_what =
                if report.transport == "tcp" { "with all headers" } else { "of UDP payload" };
            say!("MTU         {} bytes {of_what}", report.mtu_bytes);
            say!("lost        {:.2} % of the packets under load", report.lost_share * 100.0);
        }
        say!("up          {}", rate(report.up_bytes_per_second));
        say!("down        {}", rate(report.down_bytes_per_second));
        say!("store       {}", rate(report.disk_bytes_per_second as f64));
        say!("limited by  {}", report.limit.sentence());
    }

    fn consistency(&self, machine: &Machine) -> Cell {
        match (machine.consistency, &machine.sync) {
            (Consistency::Consistent, None) => self.cell("consistent", Color::Green),
            (Consistency::Empty, None) => self.cell("empty", Color::Yellow),
            (Consistency::Syncing, None) => self.cell("not consistent", Color::Red),
            (_, Some(sync)) => {
                let percent = sync.done_bytes * 100 / sync.total_bytes.max(1);
                self.cell(format!("syncing, {percent} %"), Color::Yellow)
            }
        }
    }

    pub(crate) fn points(&self, points: &[Point]) {
        if self.json {
            return self.json(&points);
        }
        let mut table = self.table(&["point", "kind"]);
        for point in points {
            table.add_row(vec![&point.id, &point.kind]);
        }
        say!("{table}");
    }

    pub(crate) fn point(&self, machine: &str, point: &Point) {
        if self.json {
            return self.json(point);
        }
        say!("{machine} has the {} point {}", point.kind, point.id);
    }

    pub(crate) fn failed_over(&self, machine: &Machine) {
        if self.json {
            return self.json(machine);
        }
        let name = &machine.name;
        if let Some(failover) = &machine.failover {
            say!("{name} is at {} ({:.1} s)", failover.point.id, failover.seconds);
            if failover.source_drained {
                say!("data loss: none, the source was shut down and drained");
            } else {
                say!("data loss: up to {:.1} s of writes", failover.data_loss_seconds);
            }
        }
        for disk in &machine.disks {
            say!("disk {}: {}", disk.name, disk.image);
        }
        say!("next: start the machine on these disks and check it, then `backhaul commit {name}`;");
        say!("      or `backhaul cancel {name}` to go back to replicating it");
    }

    pub(crate) fn cancelled(&self, machine: &Machine) {
        if self.json {
            return self.json(machine);
        }
        say!("{} replicates again", machine.name);
    }

    pub(crate) fn committed(&self, machine: &Machine) {
        if self.json {
            return self.json(machine);
        }
        say!("{} lives on-premises; its protection has ended, its disks stay:", machine.name);
        for disk in &machine.disks {
            say!("disk {}: {}", disk.name, disk.image);
        }
    }
}

pub(crate) fn stage(machine: &Machine) -> String {
    let word = match machine.stage {
        Stage::Replicating => "replicating",
        Stage::FailingOver => "failing over",
        Stage::FailedOver => "failed over",
        Stage::Cancelling => "cancelling",
        Stage::Committing => "committing",
        Stage::Committed => "committed",
    };
    word.to_owned()
}
