//! The steps of a repair, and what a check hands its findings to.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;

use crate::report::{CheckReport, Finding};

/// Steps of one plan; a disk with more damage is planned again after the first repair.
pub const FIXES_MAX: usize = 16_384;

/// One step of a repair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// The file that it changes.
    pub path: PathBuf,
    /// What it does.
    pub sentence: String,
    /// Bytes of the disk that read as zeros afterwards because their place is lost, or that may be another
    /// place's.
    pub lost_bytes: u64,
    /// Bytes that it gives back though they are not zeros: no table names them, but if tables were lost
    /// they may be of the disk.
    pub freed_bytes: u64,
    #[serde(skip)]
    pub(crate) actions: Vec<Action>,
}

/// What a fix does to its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Write {
        offset: u64,
        /// Shared where both copies of a table get the same.
        bytes: Arc<[u8]>,
    },
    /// A write that is done when all else of the plan is durable: it names what that wrote.
    Name {
        offset: u64,
        bytes: [u8; 4],
    },
    SetLength(u64),
    Free {
        offset: u64,
        length: u64,
    },
    /// Bytes beyond the end of the file are zeros. Not longer than a grain.
    Copy {
        from: u64,
        to: u64,
        length: u64,
    },
}

/// What becomes of space that no table names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaks {
    /// It is told and left alone: whoever lost both copies of a table finds its data there.
    Keep,
    /// It is given back to the file system, unless the plan tells a loss.
    Free,
}

/// Takes what a check finds, and how it could be mended.
pub(crate) struct Sink<'a> {
    pub(crate) report: &'a mut CheckReport,
    pub(crate) fixes: Option<&'a mut Vec<Fix>>,
    pub(crate) leaks: Leaks,
}

impl<'a> Sink<'a> {
    /// For a check: nothing is mended.
    pub(crate) fn of_check(report: &'a mut CheckReport) -> Self {
        Self { report, fixes: None, leaks: Leaks::Keep }
    }

    pub(crate) fn find(&mut self, finding: Finding) {
        self.report.add(finding);
    }

    pub(crate) fn fix(&mut self, path: &Path, sentence: &str, action: impl FnOnce() -> Action) {
        self.fix_losing(path, sentence.to_owned(), 0, || vec![action()]);
    }

    pub(crate) fn fix_losing(
        &mut self,
        path: &Path,
        sentence: String,
        lost_bytes: u64,
        actions: impl FnOnce() -> Vec<Action>,
    ) {
        if let Some(fixes) = self.fixes.as_deref_mut().filter(|fixes| fixes.len() < FIXES_MAX) {
            let (path, actions) = (path.to_owned(), actions());
            fixes.push(Fix { path, sentence, lost_bytes, freed_bytes: 0, actions });
        }
    }

    /// A fix that gives space back in which so many bytes are not zeros.
    pub(crate) fn fix_freeing(
        &mut self,
        path: &Path,
        sentence: String,
        freed_bytes: u64,
        action: Action,
    ) {
        let before = self.fixes.as_ref().map_or(0, |fixes| fixes.len());
        self.fix_losing(path, sentence, 0, || vec![action]);
        if let Some(fix) = self.fixes.as_deref_mut().and_then(|fixes| fixes.get_mut(before)) {
            fix.freed_bytes = freed_bytes;
        }
    }
}
