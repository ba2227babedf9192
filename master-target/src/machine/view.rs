//! A machine and its points as the API shows them.

use std::time::Instant;

use backhaul_api::{
    Consistency as ConsistencyView, Disk, FailoverResult, Machine as View, Point,
    Stage as StageView, Sync,
};
use backhaul_proto::id::PointId;

use super::Machine;
use crate::failover::Stage;
use crate::machine_state::Consistency;
use crate::recovery_point::PointText;

impl Machine {
    pub(super) fn sync_view(&self) -> Option<Sync> {
        let progress = self.progress.as_ref().filter(|_| self.link.is_some())?;
        (progress.sync_total_bytes > 0).then_some(Sync {
            total_bytes: progress.sync_total_bytes,
            done_bytes: progress.sync_done_bytes,
            sent_bytes: progress.sync_sent_bytes,
        })
    }

    /// The machine as the API shows it.
    pub fn view(&self, now: Instant) -> View {
        let progress = self.progress.clone().filter(|_| self.link.is_some()).unwrap_or_default();
        let replicating = matches!(self.failover.stage(), Stage::Replicating);
        let failover = match self.failover.stage() {
            Stage::FailedOver(outcome)
            | Stage::Committed(outcome)
            | Stage::Removing { outcome, .. } => Some(FailoverResult {
                point: point_view(outcome.point.id()),
                source_drained: outcome.drained,
                data_loss_seconds: outcome.loss_seconds,
                seconds: outcome.seconds,
            }),
            _ => None,
        };
        let sizes = &self.state.disks;
        View {
            name: self.config.name.to_string(),
            agent: self.config.agent.to_string(),
            connected: self.link.is_some(),
            consistency: match self.state.consistency {
                Consistency::Empty => ConsistencyView::Empty,
                Consistency::Syncing => ConsistencyView::Syncing,
                Consistency::Consistent => ConsistencyView::Consistent,
            },
            stage: match self.failover.stage() {
                Stage::Replicating => StageView::Replicating,
                Stage::ShuttingDown { .. } | Stage::Draining { .. } | Stage::Preparing { .. } => {
                    StageView::FailingOver
                }
                Stage::FailedOver(_) => StageView::FailedOver,
                Stage::Cancelling { .. } => StageView::Cancelling,
                Stage::Removing { .. } => StageView::Committing,
                Stage::Committed(_) => StageView::Committed,
            },
            step: self.failover.step().to_owned(),
            failure: self.failover.failure().to_owned(),
            trouble: [&self.trouble, &self.refusal, &progress.trouble]
                .into_iter()
                .find(|sentence| !sentence.is_empty())
                .cloned()
                .unwrap_or_default(),
            rpo_seconds: self
                .watermark
                .rpo(now)
                .filter(|_| replicating)
                .map(|rpo| rpo.as_secs_f64()),
            // What the agent holds after a failover is not on its way to here.
            lag_bytes: if failover.is_some() { 0 } else { progress.queued_bytes },
            dirty_bytes: if failover.is_some() { 0 } else { progress.dirty_bytes },
            sync: self.sync_view(),
            journal_bytes: self
                .open
                .as_ref()
                .and_then(|open| open.usage)
                .map_or(0, |usage| usage.journal_bytes),
            received_wire_bytes: self.received.0,
            received_plain_bytes: self.received.1,
            referenced_bytes: self.referenced_bytes,
            repeated_batches: self.repeated_batches,
            last_sync_seconds: self.sync_times.1.map(|time| time.as_secs_f64()),
            points: self.state.point.iter().map(|point| point_view(point.id())).collect(),
            failover,
            disks: self
                .config
                .disks
                .iter()
                .map(|disk| Disk {
                    name: disk.name.to_string(),
                    image: disk.image.display().to_string(),
                    kind: disk.kind.to_string(),
                    size_bytes: sizes
                        .iter()
                        .find(|known| known.name == disk.name.as_str())
                        .map_or(0, |known| known.size_bytes),
                })
                .collect(),
        }
    }
}

/// A point as the API shows it.
pub fn point_view(id: PointId) -> Point {
    Point { id: PointText(id).to_string(), kind: "crash-consistent".into() }
}
