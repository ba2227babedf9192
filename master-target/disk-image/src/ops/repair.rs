//! Repair: a plan that is read first, then applied.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::{
    error::{ErrorKind, ImageError, Result},
    fix::{Action, Fix, Leaks, Sink},
    folder::Locks,
    image::Deep,
    open::{OpenOptions, open_disk, take_lock},
    recover::plan_footer,
    report::{CheckReport, Progress},
    storage::Store,
};

/// What a repair would do. Nothing is changed until it is applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairPlan {
    /// The image.
    pub path: PathBuf,
    /// What is wrong; `None` where the image could not be opened at all.
    pub report: Option<CheckReport>,
    /// Why it could not be opened.
    pub cannot_open: Option<String>,
    /// The steps, in order. Empty: there is nothing that a repair could do.
    pub fixes: Vec<Fix>,
    /// Bytes of the disk that will read as zeros because they cannot be found any more, or may read as
    /// another place's because nothing tells which of two they are.
    pub lost_bytes: u64,
    /// Bytes in the space that is given back that are not zeros: they may be of the disk, if its tables
    /// were lost.
    pub freed_bytes: u64,
    #[serde(skip)]
    options: OpenOptions,
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairOutcome {
    /// Steps that were applied.
    pub applied: usize,
    /// The check afterwards; `None` where the image still cannot be opened.
    pub report: Option<CheckReport>,
    /// Why it cannot be opened: plan the next repair.
    pub cannot_open: Option<String>,
}

/// Looks for what can be repaired in one link: parents are never changed. A repair may bring the
/// next damage to light, so plan again after applying one, until a plan has no steps. Space that no
/// table names is given back only where `leaks` says so, and never beside a loss.
///
/// # Errors
/// The image cannot be opened for a reason that no repair mends, the file system fails, or
/// `progress` stops it.
pub fn plan_repair(
    path: &Path,
    options: &OpenOptions,
    leaks: Leaks,
    progress: &mut dyn Progress,
) -> Result<RepairPlan> {
    let options = OpenOptions { writable: false, ..*options };
    let mut plan = RepairPlan {
        path: path.to_owned(),
        report: None,
        cannot_open: None,
        fixes: Vec::new(),
        lost_bytes: 0,
        freed_bytes: 0,
        options,
    };
    match open_disk(path, &options, 1) {
        Ok(disk) => {
            let mut report = CheckReport::default();
            let mut sink = Sink { report: &mut report, fixes: Some(&mut plan.fixes), leaks };
            disk.examine(Deep::Yes, &mut sink, progress)?;
            plan.report = Some(report);
        }
        Err(error) => {
            plan.fixes = match error.mend() {
                Some(fix) => vec![fix.clone()],
                None if error.kind() == ErrorKind::Damaged => plan_footer(path, &error, progress)?,
                None => Vec::new(),
            };
            if plan.fixes.is_empty() {
                return Err(error);
            }
            plan.cannot_open = Some(error.to_string());
        }
    }
    plan.lost_bytes = plan.fixes.iter().map(|fix| fix.lost_bytes).sum();
    plan.freed_bytes = plan.fixes.iter().map(|fix| fix.freed_bytes).sum();
    Ok(plan)
}

/// Applies a plan and checks the image.
///
/// # Errors
/// A file is in use or fails. A repair that was interrupted is planned and applied again.
pub fn apply_repair(plan: &RepairPlan, progress: &mut dyn Progress) -> Result<RepairOutcome> {
    let writable = OpenOptions { writable: true, ..plan.options };
    let mut files: BTreeMap<&Path, Store> = BTreeMap::new();
    let mut locks = Locks::default();
    for fix in &plan.fixes {
        if !files.contains_key(fix.path.as_path()) {
            let file = File::options().read(true).write(true).open(&fix.path);
            let file = file.map_err(|source| ImageError::io("open", &fix.path, source))?;
            take_lock(&file, &fix.path, &writable, &mut locks)?;
            files.insert(&fix.path, Store::new(&fix.path, Box::new(file)));
        }
    }
    let mut copied = false;
    for names in [false, true] {
        let actions = plan.fixes.iter().flat_map(|fix| {
            let actions = fix.actions.iter().map(|action| (fix.path.as_path(), action));
            actions.filter(|(_, action)| matches!(action, Action::Name { .. }) == names)
        });
        for (path, action) in actions {
            let Some(store) = files.get(path) else { continue };
            // A table must not name a copy that a power cut can still take away.
            if copied && !matches!(action, Action::Copy { .. }) {
                store.sync()?;
                copied = false;
            }
            apply(action, store, &mut copied)?;
        }
        for store in files.values() {
            store.sync()?;
        }
    }
    drop((files, locks));
    let mut outcome = RepairOutcome { applied: plan.fixes.len(), report: None, cannot_open: None };
    match open_disk(&plan.path, &plan.options, 1) {
        Ok(disk) => {
            let mut report = CheckReport::default();
            disk.examine(Deep::Yes, &mut Sink::of_check(&mut report), progress)?;
            outcome.report = Some(report);
        }
        Err(error) => outcome.cannot_open = Some(error.to_string()),
    }
    Ok(outcome)
}

fn apply(action: &Action, store: &Store, copied: &mut bool) -> Result<()> {
    match action {
        Action::Write { offset, bytes } => store.write(bytes, *offset),
        Action::Name { offset, bytes } => store.write(bytes, *offset),
        Action::SetLength(length) => store.set_length(*length),
        Action::Free { offset, length } => store.free(*offset, *length),
        Action::Copy { from, to, length } => {
            let there = store.length()?.saturating_sub(*from).min(*length);
            let mut bytes = store.read_vec(*from, there as usize)?;
            bytes.resize(*length as usize, 0);
            *copied = true;
            store.write(&bytes, *to)
        }
    }
}
