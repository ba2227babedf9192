//! Copies of control frames, so that one lost packet does not hold control up.
//!
//! A packet that is lost is sent again a round trip later, and until then everything behind it on
//! its stream waits. So small control frames are sent once more, a moment later and in another
//! packet, as a QUIC datagram; whichever comes first is delivered. The stream stays the authority:
//! it has every frame, and a copy only ever saves waiting.
//!
//! A datagram holds neighbouring frames:
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 1 | 1 |
//! | 1 | 8 | place of the first frame among those of its stream and direction, from 0 |
//! | 9 | | frames as they travel on the stream, one after the other |
//!
//! Both halves are pure; `connection` feeds them.

use std::collections::{BTreeMap, VecDeque};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::message::frame_len;

/// Frames in a datagram take at most this much, in bytes: with its header and QUIC's it fits the
/// smallest packet that QUIC allows, 1,200 bytes. A larger frame has no copy.
pub(crate) const COPIES_BYTES_MAX: usize = 1000;

/// A frame is in so many datagrams when others follow soon: with 2 % of the packets lost, one frame
/// in six million then waits for the stream, instead of one in 2,500.
const COPIES_MAX: u8 = 3;

/// Copies that may wait for a frame before them, which only the stream can bring: more than control
/// says in several round trips, and at most a quarter of a megabyte. Beyond it copies are dropped.
const AHEAD_MAX: u64 = 256;

/// What a datagram of copies begins with. Others are ignored.
const KIND: u8 = 1;
const HEADER_BYTES: usize = 9;

/// The newest frames that were sent, for the next datagram.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// Place of the frame that is sent next.
    next: u64,
    /// The frames just before it, each with how often it was copied.
    recent: VecDeque<(Bytes, u8)>,
    recent_bytes: usize,
}

impl Outgoing {
    /// A frame was sent on the stream, at `place`.
    pub(crate) fn handle_sent(&mut self, place: u64, frame: Bytes) {
        // The frames of a datagram are neighbours: what was not handed in is a gap.
        if place != self.next || frame.len() > COPIES_BYTES_MAX {
            self.recent.clear();
            self.recent_bytes = 0;
        }
        self.next = place + 1;
        if frame.len() <= COPIES_BYTES_MAX {
            self.recent_bytes += frame.len();
            self.recent.push_back((frame, 0));
        }
        while self.recent_bytes > COPIES_BYTES_MAX {
            self.forget_oldest();
        }
    }

    /// The next datagram; `None` when nothing is left to be copied.
    pub(crate) fn poll_datagram(&mut self) -> Option<Bytes> {
        let first = self.next - self.recent.len() as u64;
        let mut datagram = BytesMut::with_capacity(HEADER_BYTES + self.recent_bytes);
        datagram.put_u8(KIND);
        datagram.put_u64_le(first);
        for (frame, copies) in &mut self.recent {
            datagram.extend_from_slice(frame);
            *copies += 1;
        }
        while self.recent.front().is_some_and(|(_, copies)| *copies >= COPIES_MAX) {
            self.forget_oldest();
        }
        (datagram.len() > HEADER_BYTES).then(|| datagram.freeze())
    }

    fn forget_oldest(&mut self) {
        if let Some((frame, _)) = self.recent.pop_front() {
            self.recent_bytes -= frame.len();
        }
    }
}

/// Puts the frames of a stream and their copies into one sequence, each frame once.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    /// Frames that the stream brought so far. The stream never leads: what it brings is delivered.
    from_stream: u64,
    /// Frames delivered so far.
    delivered: u64,
    /// Copies of frames that were not delivered yet, by their place.
    ahead: BTreeMap<u64, Bytes>,
}

impl Incoming {
    /// The stream brought its next frame. It is returned unless a copy was delivered before it.
    pub(crate) fn handle_frame(&mut self, content: Bytes) -> Option<Bytes> {
        let place = self.from_stream;
        self.from_stream += 1;
        if place < self.delivered {
            return None;
        }
        self.delivered = self.from_stream;
        self.ahead.remove(&place);
        Some(content)
    }

    /// A datagram came. What is no copy, or of no use, is passed over: the stream has it all.
    pub(crate) fn handle_datagram(&mut self, mut datagram: Bytes) {
        if datagram.len() < HEADER_BYTES || datagram.get_u8() != KIND {
            return;
        }
        let mut place = datagram.get_u64_le();
        while let Some(prefix) = datagram.first_chunk::<4>() {
            let Ok(len) = frame_len(*prefix) else { return };
            datagram.advance(4);
            if datagram.len() < len {
                return;
            }
            let content = datagram.split_to(len);
            if place.checked_sub(self.delivered).is_some_and(|ahead| ahead < AHEAD_MAX) {
                self.ahead.insert(place, content);
            }
            let Some(next) = place.checked_add(1) else { return };
            place = next;
        }
    }

    /// The next frame, when a copy of it is here.
    pub(crate) fn poll_copy(&mut self) -> Option<Bytes> {
        let content = self.ahead.remove(&self.delivered)?;
        self.delivered += 1;
        Some(content)
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, Bytes, BytesMut};
    use proptest::prelude::*;

    use super::{AHEAD_MAX, COPIES_BYTES_MAX, COPIES_MAX, Incoming, Outgoing};

    /// Content of a frame that names its place.
    fn content(place: u64, len: usize) -> Bytes {
        let mut bytes = vec![place as u8; len.max(8)];
        bytes[..8].copy_from_slice(&place.to_le_bytes());
        bytes.into()
    }

    fn framed(content: &Bytes) -> Bytes {
        let mut frame = BytesMut::new();
        frame.put_u32_le(content.len() as u32);
        frame.extend_from_slice(content);
        frame.freeze()
    }

    #[test]
    fn a_copy_stands_in_for_a_lost_packet_and_the_stream_is_not_heard_twice() {
        let (mut out, mut into) = (Outgoing::default(), Incoming::default());
        let frames = [content(0, 20), content(1, 30), content(2, 8)];
        assert_eq!(into.handle_frame(frames[0].clone()), Some(frames[0].clone()));
        // The packet with frame 1 is lost, and frame 2 waits behind it.
        for (place, frame) in frames.iter().enumerate() {
            out.handle_sent(place as u64, framed(frame));
        }
        into.handle_datagram(out.poll_datagram().unwrap());
        assert_eq!(into.poll_copy(), Some(frames[1].clone()));
        assert_eq!(into.poll_copy(), Some(frames[2].clone()));
        assert_eq!(into.poll_copy(), None);
        assert_eq!(into.handle_frame(frames[1].clone()), None);
        assert_eq!(into.handle_frame(frames[2].clone()), None);
        assert_eq!(into.handle_frame(content(3, 8)), Some(content(3, 8)));
    }

    #[test]
    fn a_frame_is_in_three_datagrams_while_others_follow_and_in_none_after() {
        let mut out = Outgoing::default();
        assert_eq!(out.poll_datagram(), None);
        out.handle_sent(0, framed(&content(0, 8)));
        for _ in 0..COPIES_MAX {
            assert!(out.poll_datagram().is_some());
        }
        assert_eq!(out.poll_datagram(), None);
    }

    #[test]
    fn what_is_too_large_has_no_copy_and_those_after_it_wait_for_the_stream() {
        let (mut out, mut into) = (Outgoing::default(), Incoming::default());
        let frames = [content(0, COPIES_BYTES_MAX), content(1, 8)];
        out.handle_sent(0, framed(&frames[0]));
        assert_eq!(out.poll_datagram(), None);
        out.handle_sent(1, framed(&frames[1]));
        into.handle_datagram(out.poll_datagram().unwrap());
        assert_eq!(into.poll_copy(), None);
        assert_eq!(into.handle_frame(frames[0].clone()), Some(frames[0].clone()));
        assert_eq!(into.poll_copy(), Some(frames[1].clone()));
    }

    #[test]
    fn a_frame_that_was_not_handed_in_leaves_a_gap_and_no_confusion() {
        let (mut out, mut into) = (Outgoing::default(), Incoming::default());
        out.handle_sent(0, framed(&content(0, 8)));
        out.handle_sent(2, framed(&content(2, 8)));
        into.handle_datagram(out.poll_datagram().unwrap());
        assert_eq!(into.poll_copy(), None);
        assert_eq!(into.handle_frame(content(0, 8)), Some(content(0, 8)));
        assert_eq!(into.handle_frame(content(1, 8)), Some(content(1, 8)));
        assert_eq!(into.poll_copy(), Some(content(2, 8)));
    }

    #[test]
    fn copies_that_wait_are_bounded() {
        let mut into = Incoming::default();
        for place in 1..10 * AHEAD_MAX {
            let mut datagram = BytesMut::new();
            datagram.put_u8(1);
            datagram.put_u64_le(place);
            datagram.extend_from_slice(&framed(&content(place, 900)));
            into.handle_datagram(datagram.freeze());
        }
        assert_eq!(into.ahead.len() as u64, AHEAD_MAX - 1);
    }

    proptest! {
        /// Whatever is lost, late, twice or out of order among the copies, and however far behind
        /// the stream is: every frame is delivered once, in order.
        #[test]
        fn every_frame_is_delivered_once_and_in_order(
            lens in prop::collection::vec(0usize..1500, 1..60),
            fates in prop::collection::vec(0u8..8, 300),
        ) {
            let (mut out, mut into) = (Outgoing::default(), Incoming::default());
            let frames: Vec<_> =
                lens.iter().enumerate().map(|(place, len)| content(place as u64, *len)).collect();
            let mut fates = fates.into_iter().cycle();
            let (mut on_the_way, mut heard, mut from_stream) = (Vec::new(), Vec::new(), 0);
            for (place, frame) in frames.iter().enumerate() {
                if fates.next() != Some(0) {
                    out.handle_sent(place as u64, framed(frame));
                }
                on_the_way.extend(out.poll_datagram());
                match fates.next() {
                    Some(0..=2) => drop(on_the_way.pop()),
                    Some(3 | 4) => on_the_way.drain(..).rev().for_each(|late| {
                        into.handle_datagram(late.clone());
                        into.handle_datagram(late);
                    }),
                    Some(5) => while from_stream < place {
                        heard.extend(into.handle_frame(frames[from_stream].clone()));
                        from_stream += 1;
                        heard.extend(std::iter::from_fn(|| into.poll_copy()));
                    },
                    _ => {}
                }
                heard.extend(std::iter::from_fn(|| into.poll_copy()));
            }
            for frame in &frames[from_stream..] {
                heard.extend(into.handle_frame(frame.clone()));
                heard.extend(std::iter::from_fn(|| into.poll_copy()));
            }
            prop_assert_eq!(heard, frames);
        }

        #[test]
        fn nothing_that_arrives_makes_it_fail(datagrams in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..40), 0..20))
        {
            let mut into = Incoming::default();
            for datagram in datagrams {
                into.handle_datagram(datagram.into());
                while into.poll_copy().is_some() {}
            }
        }
    }
}
