//! A guest: it runs a workload against an NBD export, as a machine in Azure would.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use backhaul_nbd::{Client, ClientError, ZeroOptions};
use bytes::BytesMut;
use tokio::task::JoinSet;

use crate::workload::{Action, Op, Workload, WorkloadSpec};

/// Requests under way at a time.
const DEPTH: usize = 16;

/// When a guest stops writing.
#[derive(Debug, Clone)]
pub enum Until {
    /// When this file appears: it was shut down.
    Off(PathBuf),
    /// After so many operations.
    Operations(u64),
}

/// What a guest did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Operations answered.
    pub operations: u64,
    /// Bytes written, zeroed or trimmed.
    pub bytes: u64,
    /// The longest that an answer took: a protected machine is never blocked.
    pub longest: Duration,
}

/// Writes until told to stop. Operations whose ranges overlap are never under way together, so the
/// order of the workload is the order of the writes.
///
/// # Errors
///
/// The first request that failed; the export's writer never notices the link, so there is none.
pub async fn write(
    client: Client,
    spec: WorkloadSpec,
    until: Until,
) -> Result<Written, ClientError> {
    let Ok(mut workload) = Workload::new(spec) else {
        return Ok(Written::default());
    };
    let start = Instant::now();
    let mut under_way: JoinSet<Result<(u64, Duration), ClientError>> = JoinSet::new();
    let mut busy: Vec<(u64, Range<u64>)> = Vec::new();
    let mut written = Written::default();
    loop {
        let stop = match &until {
            Until::Off(file) => file.exists(),
            Until::Operations(most) => written.operations + under_way.len() as u64 >= *most,
        };
        if stop && under_way.is_empty() {
            return Ok(written);
        }
        if !stop {
            let op = workload.next_op();
            tokio::time::sleep_until((start + op.due).into()).await;
            let range = op.action.range().cloned();
            while under_way.len() >= DEPTH
                || range.as_ref().is_some_and(|range| overlaps(range, &busy))
            {
                finish_one(&mut under_way, &mut busy, &mut written).await?;
            }
            if let Some(range) = range {
                written.bytes += range.end - range.start;
                busy.push((op.number, range));
            }
            let data = match &op.action {
                Action::Write { range, .. } => {
                    let mut data = BytesMut::zeroed((range.end - range.start) as usize);
                    workload.fill(&op, &mut data);
                    data
                }
                _ => BytesMut::new(),
            };
            under_way.spawn(run(client.clone(), op, data));
            continue;
        }
        finish_one(&mut under_way, &mut busy, &mut written).await?;
    }
}

fn overlaps(range: &Range<u64>, busy: &[(u64, Range<u64>)]) -> bool {
    busy.iter().any(|(_, other)| range.start < other.end && other.start < range.end)
}

async fn finish_one(
    under_way: &mut JoinSet<Result<(u64, Duration), ClientError>>,
    busy: &mut Vec<(u64, Range<u64>)>,
    written: &mut Written,
) -> Result<(), ClientError> {
    let Some(done) = under_way.join_next().await else { return Ok(()) };
    let (number, time) = done.map_err(|_| ClientError::Closed)??;
    busy.retain(|(other, _)| *other != number);
    written.operations += 1;
    written.longest = written.longest.max(time);
    Ok(())
}

async fn run(client: Client, op: Op, data: BytesMut) -> Result<(u64, Duration), ClientError> {
    let start = Instant::now();
    match op.action {
        Action::Write { range, fua, .. } => client.write(range.start, data.freeze(), fua).await?,
        Action::WriteZeroes { range, no_hole } => {
            let options = ZeroOptions { no_hole, ..ZeroOptions::default() };
            client.write_zeroes(range.start, (range.end - range.start) as u32, options).await?;
        }
        Action::Trim { range } => {
            client.trim(range.start, (range.end - range.start) as u32, false).await?
        }
        Action::Flush => client.flush().await?,
    }
    Ok((op.number, start.elapsed()))
}
