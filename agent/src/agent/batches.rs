//! Batches on their way to the target, and what the sync asks and answers.

use std::time::Instant;

use backhaul_proto::batch::EncodedBatch;
use backhaul_proto::id::{BatchSeq, Generation};
use backhaul_proto::link::Transport;
use backhaul_proto::message::{Ack, HashReply, HashRequest, Resend, agent_message};
use backhaul_proto::session::{Due, Release, Weight};

use super::Agent;
use crate::batch::Encoded;
use crate::capture::Mode;
use crate::sync::{SyncInput, SyncOutput};

impl Agent {
    pub(super) fn handle_encoded(&mut self, index: usize, encoded: Encoded) {
        let machine = &mut self.machines[index];
        if encoded.batch.header.generation != machine.sender.generation() {
            return;
        }
        machine.encoded.insert(encoded.batch.header.batch, encoded);
        while let Some(entry) = machine.encoded.first_entry() {
            if *entry.key() != machine.sender.newest().next() {
                break;
            }
            let Encoded { mut batch, plain_held_bytes } = entry.remove();
            // It was encoded for the target of before.
            if !self.references && !batch.references().is_empty() {
                match batch.unfold() {
                    Ok(unfolded) => batch = unfolded,
                    Err(error) => return self.give_up_stream(index, &error),
                }
            }
            let held_bytes = batch.held_bytes() as u64;
            machine.capture.order().handle_resized(plain_held_bytes, held_bytes);
            machine.sender.push(batch);
        }
        self.transmit(index);
    }

    pub(super) fn transmit(&mut self, index: usize) {
        let (Some(link), machine) = (&self.link, &mut self.machines[index]) else { return };
        let Some(on_wire) = machine.replicating else { return };
        let (now, transport) = (Instant::now(), link.connection.transport());
        loop {
            let is_bare_point = machine.sender.peek_transmit().is_some_and(is_bare_point);
            // It costs the ceiling next to nothing, and waits for nobody's data but its machine's.
            let waits = !is_bare_point && self.ceiling.poll_ready(now).is_err();
            if waits || machine.limit.poll_ready(now).is_err() {
                break;
            }
            let Some(batch) = machine.sender.poll_transmit() else {
                machine.limit.handle_idle();
                break;
            };
            let weight = machine.sender.weight();
            machine.ack_times.handle_sent(now, batch.header.batch);
            let mut due = self.ceiling.handle_sent(now, batch.wire_bytes(), &mut machine.limit);
            if is_bare_point {
                due.link = Release::at_once(now);
            }
            self.metrics.sent(machine.config.name.as_str(), &batch);
            self.referenced_bytes += u64::from(batch.header.referenced_bytes());
            if self.control_batches && weight == Weight::Light && fits_control(&batch, transport) {
                let bytes = batch.chunks(on_wire).concat().into();
                link.control(agent_message::Kind::Batch(bytes));
                continue;
            }
            link.batch(batch.chunks(on_wire), due, weight);
        }
        let still =
            |machine: &super::Machine| machine.replicating.is_none() || machine.limit.is_still(now);
        if self.machines.iter().all(still) {
            self.ceiling.handle_idle();
        }
    }

    /// Each machine in turn is the first under the common ceiling.
    pub(super) fn transmit_all(&mut self) {
        let count = self.machines.len();
        self.first_to_send = (self.first_to_send + 1) % count.max(1);
        for step in 0..count {
            self.transmit((self.first_to_send + step) % count);
        }
    }

    /// When a machine that a ceiling holds back may send again.
    pub(super) fn next_transmit(&self) -> Option<Instant> {
        let now = Instant::now();
        let link = self.ceiling.poll_ready(now).err();
        let replicating = self.machines.iter().filter(|machine| machine.replicating.is_some());
        replicating
            .filter(|machine| machine.sender.held_bytes() > 0)
            .filter_map(|machine| machine.limit.poll_ready(now).err().max(link))
            .min()
    }

    pub(super) fn handle_ack(&mut self, ack: &Ack) {
        let Some(machine) = self.machines.get_mut(ack.machine as usize) else { return };
        if machine.replicating.is_none() {
            return;
        }
        match machine.sender.handle_ack(BatchSeq(ack.durable_batch), ack.window_bytes) {
            Ok(released) => {
                self.acked_wire_bytes += released.wire_bytes;
                let name = machine.config.name.as_str();
                let durable = BatchSeq(ack.durable_batch);
                for (batch, time) in machine.ack_times.handle_acked(Instant::now(), durable) {
                    let seconds = time.as_secs_f64();
                    tracing::trace!(machine = name, %batch, seconds, "acknowledged");
                    self.metrics.acknowledged(name, seconds);
                }
                let applied = BatchSeq(ack.applied_batch);
                machine.dedupe.handle_acked(machine.sender.acked(), applied);
                let mut order = machine.capture.order();
                order.handle_resized(released.bytes, 0);
                let wake = order.mode() != Mode::Ordered && order.has_room_for_sync();
                drop(order);
                if wake {
                    machine.sync.send(SyncInput::Wake);
                }
                self.transmit(ack.machine as usize);
            }
            Err(error) => {
                let reason = error.to_string();
                self.drop_link(&reason);
            }
        }
    }

    /// The target does not hold what a batch refers to: it gets the data. Under way as it was, the
    /// batch waits for no window and no ceiling again.
    pub(super) fn handle_resend(&mut self, resend: &Resend) {
        let index = resend.machine as usize;
        let Some(machine) = self.machines.get_mut(index) else { return };
        let (Some(link), Some(on_wire)) = (&self.link, machine.replicating) else { return };
        if Generation(resend.generation) != machine.sender.generation() {
            return;
        }
        let unfolded = match machine.sender.handle_resend(BatchSeq(resend.batch)) {
            Ok(Some(unfolded)) => unfolded,
            Ok(None) => return,
            Err(error) => return self.give_up_stream(index, &error),
        };
        let name = machine.config.name.as_str();
        tracing::debug!(machine = name, batch = resend.batch, "sent again, without references");
        machine.capture.order().handle_resized(unfolded.before_bytes, unfolded.after_bytes);
        machine.dedupe.handle_unresolved(&unfolded.references);
        let (now, wire_bytes) = (Instant::now(), unfolded.batch.wire_bytes());
        self.ceiling.handle_sent(now, wire_bytes, &mut machine.limit);
        self.metrics.resent(name, &unfolded);
        let referenced: u64 = unfolded.references.iter().map(|one| u64::from(one.len_bytes)).sum();
        self.referenced_bytes = self.referenced_bytes.saturating_sub(referenced);
        let due = Due::at_once(now);
        link.batch(unfolded.batch.chunks(on_wire), due, Weight::Heavy);
    }

    pub(super) fn handle_sync(&mut self, output: SyncOutput) {
        let of = |name| self.machines.iter().position(|machine| machine.config.name == name);
        match output {
            SyncOutput::Ask { machine, question, after } => {
                let Some(index) = of(machine) else { return };
                let on_wire = self.machines[index].replicating;
                if let (Some(link), Some(on_wire)) = (&self.link, on_wire) {
                    link.ask(HashRequest {
                        request: tag_request(index, question.request),
                        machine: on_wire.0.into(),
                        disk: question.first.disk.0.into(),
                        first_region: question.first.region,
                        regions: question.regions,
                        leaves: question.leaves,
                        after_batch: after.0,
                    });
                }
            }
            SyncOutput::Sent { machine, bytes } => {
                let Some(index) = of(machine) else { return };
                self.machines[index].sync_sent_bytes += bytes;
            }
            SyncOutput::Trouble { machine, sentence } => {
                let Some(index) = of(machine) else { return };
                self.machines[index].trouble = sentence;
            }
            SyncOutput::Finished { machine } => {
                let Some(index) = of(machine) else { return };
                let machine = &mut self.machines[index];
                let sent_bytes = std::mem::take(&mut machine.sync_sent_bytes);
                machine.next_point = Instant::now() + machine.point_period.unwrap_or_default();
                tracing::info!(machine = %machine.config.name, sent_bytes, "the sync is over: every block is in the stream");
                self.report_progress();
            }
        }
    }

    pub(super) fn handle_answer(&mut self, reply: HashReply) {
        let (index, request) = untag_request(reply.request);
        let Some(machine) = self.machines.get_mut(index) else { return };
        if let Some(failure) = &reply.failure {
            machine.trouble.clone_from(&failure.sentence);
            tracing::error!(machine = %machine.config.name, "{}", failure.sentence);
        }
        // An answer without hashes makes the sync send the region unseen, which is always right.
        machine.sync.send(SyncInput::Answer(HashReply { request, ..reply }));
    }
}

/// Requests of different machines share one stream; the machine travels in the upper bits.
fn tag_request(index: usize, request: u64) -> u64 {
    (index as u64) << 48 | request
}

fn untag_request(tagged: u64) -> (usize, u64) {
    ((tagged >> 48) as usize, tagged & ((1 << 48) - 1))
}

/// Whether a batch is the marker of a recovery point with no data before it. As many of these are sent as
/// points are set; zeroed space has no data either, and a guest may zero without end.
fn is_bare_point(batch: &EncodedBatch) -> bool {
    batch.ends_with_point()
        && batch.header.data_bytes() == 0
        && fits_control(batch, Transport::Quic)
}

/// Whether a batch may travel in a control message.
fn fits_control(batch: &EncodedBatch, transport: Transport) -> bool {
    batch.wire_bytes() <= transport.control_batch_bytes_max() && batch.header.folded.is_none()
}

#[cfg(test)]
mod tests {
    use backhaul_proto::batch::{
        BatchKind, Compression, Compressor, PlainBatch, Record, RecordKind,
    };
    use backhaul_proto::id::{BatchSeq, DiskIndex, Generation, PointId, WriteSeq};
    use bytes::Bytes;

    use super::is_bare_point;

    /// Whatever had no data passed the common ceiling, so a guest that zeroed its disk was under none.
    #[test]
    fn only_the_marker_of_a_point_passes_a_ceiling() {
        let zero = RecordKind::Zero { offset_bytes: 0, len_bytes: 4096, may_unmap: true };
        let data = RecordKind::Data { offset_bytes: 0, len_bytes: 512 };
        let point = RecordKind::Point(PointId(1));
        for (kinds, passes) in [
            (vec![point], true),
            (vec![zero, point], true),
            (vec![zero], false),
            (vec![data, point], false),
            (vec![RecordKind::SyncDone], false),
        ] {
            let records: Vec<_> =
                kinds.iter().map(|kind| Record { disk: DiskIndex(0), kind: *kind }).collect();
            let data_bytes = records.iter().map(Record::data_bytes).sum();
            let batch = PlainBatch {
                kind: BatchKind::Ordered,
                generation: Generation(1),
                batch: BatchSeq(1),
                first_write: WriteSeq(1),
                captured_at_us: 0,
                records,
                data: vec![Bytes::from(vec![7; data_bytes])],
                data_bytes,
            };
            let batch = batch.encode(Compression::Off, &mut Compressor::default());
            assert_eq!(is_bare_point(&batch), passes, "{kinds:?}");
        }
    }
}
