//! Several datagrams at once between a TUN device and the forwarder, as network cards take and give them.
//!
//! Without this each datagram is read and written alone, and at 1 Gbit/s the line takes as much of a machine
//! as the programs that are measured over it. So the device announces segmentation: what a program sends with
//! one call (`UDP_SEGMENT`) is read whole and [cut](Cut) here, before anything happens to it; and datagrams
//! of one flow that arrive in one turn are [joined](Join) to one write, which the receiving socket gets in one
//! call if it asked for that (`UDP_GRO`), and one by one if not. TCP's segments are cut by the kernel.
//!
//! The header is `struct virtio_net_hdr` of `linux/virtio_net.h`, ten bytes in the machine's own order.

/// Bytes before each IP packet.
pub(super) const HEADER_BYTES: usize = 10;
/// What a read gives at most: a header and the longest IP packet.
pub(super) const READ_BYTES_MAX: usize = HEADER_BYTES + u16::MAX as usize;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the pseudo header's sum alone.
const NEEDS_CHECKSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_NONE` and `VIRTIO_NET_HDR_GSO_UDP_L4`.
const KIND_NONE: u8 = 0;
const KIND_UDP: u8 = 5;
/// IPv4 without options (RFC 791), then UDP (RFC 768).
const IP_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
const HEADERS_BYTES: usize = IP_BYTES + UDP_BYTES;
/// Where UDP's checksum is in its header.
const UDP_CHECKSUM_AT: usize = 6;
const PROTOCOL_UDP: u8 = 17;
/// Most datagrams that the kernel itself joins for a socket (`UDP_GRO_CNT_MAX`), whose buffer may hold no more.
const JOINED_MAX: usize = 64;

/// What was read from the device, as single packets, each with a header of its own before it.
#[derive(Debug)]
pub(super) struct Cut<'a> {
    header: &'a [u8],
    /// The IP packet; `payload` is what of a joined one was not cut off yet.
    packet: &'a [u8],
    payload: &'a [u8],
    segment_bytes: usize,
    id: u16,
}

impl<'a> Cut<'a> {
    /// `None` when it is not a header and at least the fixed part of an IP header, or a joined packet of
    /// another kind than UDP over plain IPv4, the only ones of the lab's sites.
    pub(super) fn new(read: &'a [u8]) -> Option<Self> {
        let (header, packet) = read.split_at_checked(HEADER_BYTES)?;
        let whole = Self { header, packet, payload: &[], segment_bytes: 0, id: 0 };
        match header[1] {
            KIND_NONE if packet.len() >= IP_BYTES => Some(whole),
            KIND_UDP if is_plain_udp(packet) => {
                let segment_bytes = usize::from(u16::from_ne_bytes([header[4], header[5]]));
                let payload = &packet[HEADERS_BYTES..];
                let id = u16::from_be_bytes([packet[4], packet[5]]);
                (segment_bytes > 0).then_some(Self { payload, segment_bytes, id, ..whole })
            }
            _ => None,
        }
    }

    /// Writes the next packet and its header into `buffer`; its length, header included, or `None` after
    /// the last. A packet that is longer than `buffer` ends the iteration.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if self.segment_bytes == 0 {
            let packet = std::mem::take(&mut self.packet);
            let len_bytes = HEADER_BYTES + packet.len();
            if packet.is_empty() || len_bytes > buffer.len() {
                return None;
            }
            buffer[..HEADER_BYTES].copy_from_slice(self.header);
            buffer[HEADER_BYTES..len_bytes].copy_from_slice(packet);
            return Some(len_bytes);
        }
        let (payload, rest) = self.payload.split_at(self.segment_bytes.min(self.payload.len()));
        let len_bytes = HEADER_BYTES + HEADERS_BYTES + payload.len();
        if payload.is_empty() || len_bytes > buffer.len() {
            return None;
        }
        self.payload = rest;
        let headers = headers(&self.packet[..HEADERS_BYTES], self.id, payload.len());
        self.id = self.id.wrapping_add(1);
        buffer[..HEADER_BYTES].copy_from_slice(&device_header(KIND_NONE, 0));
        buffer[HEADER_BYTES..][..HEADERS_BYTES].copy_from_slice(&headers);
        buffer[HEADER_BYTES + HEADERS_BYTES..len_bytes].copy_from_slice(payload);
        Some(len_bytes)
    }
}

/// How many packets were taken for one write, and what they have in common.
#[derive(Debug, Default)]
pub(super) struct Join {
    count: usize,
    payload_bytes: usize,
    segment_bytes: usize,
    /// Nothing may follow: a datagram that is shorter than the others is the last, and what is no plain
    /// UDP goes alone.
    closed: bool,
}

impl Join {
    /// Whether `packet`, with its header, goes into the same write as `first`, which was the first that this
    /// returned true for. Always true for a first one.
    pub(super) fn takes(&mut self, first: &[u8], packet: &[u8]) -> bool {
        let payload_bytes = packet.len().saturating_sub(HEADER_BYTES + HEADERS_BYTES);
        let is_plain = packet[0] == NEEDS_CHECKSUM
            && packet[1] == KIND_NONE
            && packet[6..HEADER_BYTES] == device_header(KIND_NONE, 0)[6..]
            && is_plain_udp(&packet[HEADER_BYTES..])
            && payload_bytes > 0;
        if self.count == 0 {
            *self =
                Self { count: 1, payload_bytes, segment_bytes: payload_bytes, closed: !is_plain };
            return true;
        }
        let fits = payload_bytes <= self.segment_bytes
            && HEADERS_BYTES + self.payload_bytes + payload_bytes <= usize::from(u16::MAX)
            && self.count < JOINED_MAX;
        if self.closed || !is_plain || !fits || flow(first) != flow(packet) {
            return false;
        }
        self.count += 1;
        self.payload_bytes += payload_bytes;
        self.closed = payload_bytes < self.segment_bytes;
        true
    }

    /// What stands before the payloads of the joined packets, the first of which is `first`. For two and more.
    pub(super) fn head(&self, first: &[u8]) -> [u8; HEADER_BYTES + HEADERS_BYTES] {
        let packet = &first[HEADER_BYTES..];
        let id = u16::from_be_bytes([packet[4], packet[5]]);
        let mut head = [0; HEADER_BYTES + HEADERS_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&device_header(KIND_UDP, self.segment_bytes));
        let headers = headers(&packet[..HEADERS_BYTES], id, self.payload_bytes);
        head[HEADER_BYTES..].copy_from_slice(&headers);
        head
    }
}

/// The payload of a joined packet.
pub(super) fn payload(packet: &[u8]) -> &[u8] {
    &packet[HEADER_BYTES + HEADERS_BYTES..]
}

/// Type of service; fragment bits, time to live and protocol; addresses; ports: what packets that are joined
/// have in common.
fn flow(packet: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let packet = packet.get(HEADER_BYTES..)?;
    Some((*packet.get(1)?, packet.get(6..10)?, packet.get(12..24)?))
}

/// Whether it is a whole IPv4 packet without options, not a fragment, that carries UDP.
fn is_plain_udp(packet: &[u8]) -> bool {
    packet.len() >= HEADERS_BYTES
        && packet[0] == 0x45
        && packet[9] == PROTOCOL_UDP
        && packet[6] & 0x3f == 0
        && packet[7] == 0
}

fn device_header(kind: u8, segment_bytes: usize) -> [u8; HEADER_BYTES] {
    let [headers_0, headers_1] = (HEADERS_BYTES as u16).to_ne_bytes();
    let [segment_0, segment_1] = (segment_bytes as u16).to_ne_bytes();
    let [start_0, start_1] = (IP_BYTES as u16).to_ne_bytes();
    let [at_0, at_1] = (UDP_CHECKSUM_AT as u16).to_ne_bytes();
    [NEEDS_CHECKSUM, kind, headers_0, headers_1, segment_0, segment_1, start_0, start_1, at_0, at_1]
}

/// `like`, an IPv4 and a UDP header, for a datagram of `payload_bytes`. UDP's checksum is that of the pseudo
/// header alone, as [`NEEDS_CHECKSUM`] says.
fn headers(like: &[u8], id: u16, payload_bytes: usize) -> [u8; HEADERS_BYTES] {
    let mut headers = [0; HEADERS_BYTES];
    headers.copy_from_slice(like);
    let udp_bytes = (UDP_BYTES + payload_bytes) as u16;
    let total_bytes = (HEADERS_BYTES + payload_bytes) as u16;
    headers[2..4].copy_from_slice(&total_bytes.to_be_bytes());
    headers[4..6].copy_from_slice(&id.to_be_bytes());
    headers[10..12].copy_from_slice(&[0; 2]);
    let checksum = !sum(&headers[..IP_BYTES], 0);
    headers[10..12].copy_from_slice(&checksum.to_be_bytes());
    headers[IP_BYTES + 4..IP_BYTES + 6].copy_from_slice(&udp_bytes.to_be_bytes());
    let pseudo = sum(&headers[12..20], u32::from(PROTOCOL_UDP) + u32::from(udp_bytes));
    headers[IP_BYTES + UDP_CHECKSUM_AT..].copy_from_slice(&pseudo.to_be_bytes());
    headers
}

/// The Internet checksum's sum (RFC 1071) of an even number of bytes, and of what was added before.
fn sum(bytes: &[u8], before: u32) -> u16 {
    let words = bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = before + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A datagram of one flow with its device's header, as a kernel gives it.
    fn datagram(id: u16, payload: &[u8]) -> Vec<u8> {
        let mut like = [0; HEADERS_BYTES];
        (like[0], like[6], like[8], like[9]) = (0x45, 0x40, 64, PROTOCOL_UDP);
        like[12..24].copy_from_slice(&[10, 213, 0, 1, 10, 213, 0, 2, 0x30, 0x39, 0x01, 0xbb]);
        let mut packet = device_header(KIND_NONE, 0).to_vec();
        packet.extend(headers(&like, id, payload.len()));
        packet.extend(payload);
        packet
    }

    fn join(packets: &[Vec<u8>]) -> Vec<u8> {
        let mut join = Join::default();
        assert!(packets.iter().all(|packet| join.takes(&packets[0], packet)));
        let mut write = join.head(&packets[0]).to_vec();
        packets.iter().for_each(|packet| write.extend(payload(packet)));
        write
    }

    fn cut(read: &[u8]) -> Vec<Vec<u8>> {
        let mut cut = Cut::new(read).unwrap();
        let mut buffer = [0; 9216];
        std::iter::from_fn(|| cut.next(&mut buffer).map(|len_bytes| buffer[..len_bytes].to_vec()))
            .collect()
    }

    #[test]
    fn what_is_joined_is_cut_to_the_same_packets() {
        let sizes = [1200, 1200, 1200, 77];
        let ids = [u16::MAX - 1, u16::MAX, 0, 1];
        let packets: Vec<_> =
            ids.into_iter().zip(sizes).map(|(id, len)| datagram(id, &vec![7; len])).collect();
        let write = join(&packets);
        assert_eq!(write.len(), HEADER_BYTES + HEADERS_BYTES + 3677);
        assert_eq!(cut(&write), packets);
    }

    #[test]
    fn a_packet_alone_passes_as_it_is() {
        let tcp = [&[0; HEADER_BYTES][..], &[0x45; 60]].concat();
        assert_eq!(cut(&tcp), std::slice::from_ref(&tcp));
        let mut join = Join::default();
        assert!(join.takes(&tcp, &tcp));
        assert!(!join.takes(&tcp, &tcp), "only datagrams are joined");
    }

    #[test]
    fn only_what_a_receiver_would_take_for_one_call_is_joined() {
        let first = datagram(1, &[7; 1200]);
        let with = |at: usize, byte: u8| {
            let mut packet = datagram(2, &[7; 1200]);
            packet[at] = byte;
            packet
        };
        let ip = HEADER_BYTES;
        for (packet, taken) in [
            (datagram(2, &[7; 1200]), true),
            (datagram(2, &[7; 3]), true),
            (datagram(2, &[7; 1201]), false),
            (datagram(2, &[]), false),
            (with(0, 0), false),
            (with(1, KIND_UDP), false),
            (with(6, 40), false),
            (with(ip, 0x46), false),
            (with(ip + 1, 3), false),
            (with(ip + 6, 0x20), false),
            (with(ip + 9, 6), false),
            (with(ip + 15, 9), false),
            (with(ip + IP_BYTES + 3, 9), false),
        ] {
            let mut join = Join::default();
            assert!(join.takes(&first, &first));
            assert_eq!(join.takes(&first, &packet), taken, "{:?}", &packet[..ip + 32]);
        }
    }

    #[test]
    fn a_write_has_an_end() {
        let takes = |len: usize, last: usize| {
            let (first, last) = (datagram(1, &vec![7; len]), datagram(1, &vec![7; last]));
            let mut join = Join::default();
            let count = (0..100).take_while(|_| join.takes(&first, &first)).count();
            (count, join.takes(&first, &last))
        };
        assert_eq!(takes(500, 500), (JOINED_MAX, false));
        assert_eq!(takes(8972, 2703), (7, true), "65,535 bytes with the headers");
        assert_eq!(takes(8972, 2704), (7, false));
        let (first, short) = (datagram(1, &[7; 1200]), datagram(1, &[7; 10]));
        let mut join = Join::default();
        assert!(join.takes(&first, &first) && join.takes(&first, &short));
        assert!(!join.takes(&first, &short), "who is shorter is the last");
    }

    #[test]
    fn what_is_no_packet_is_none() {
        assert!(Cut::new(&[]).is_none());
        assert!(Cut::new(&[0; HEADER_BYTES + 19]).is_none());
        let of_kind = |kind: u8, segment: u8| {
            let mut read = datagram(1, &[7; 1200]);
            (read[1], read[4], read[5]) = (kind, segment, 0);
            Cut::new(&read).is_some()
        };
        assert!(of_kind(KIND_UDP, 100) && !of_kind(KIND_UDP, 0) && !of_kind(1, 100));
        let long = datagram(1, &[7; 1200]);
        assert_eq!(Cut::new(&long).unwrap().next(&mut [0; 1000]), None);
    }

    /// The header that Wikipedia's "Internet checksum" computes by hand.
    #[test]
    fn a_checksum_is_what_others_compute() {
        let mut header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0,
            0xc7,
        ];
        assert_eq!(!sum(&header, 0), 0xb861);
        header[10..12].copy_from_slice(&[0xb8, 0x61]);
        assert_eq!(sum(&header, 0), 0xffff);
        let made = headers(&[&header[..], &[0; 8]].concat(), 0, 0x73 - 28);
        assert_eq!(made[..IP_BYTES], header);
        // c0a8 + 0001 + c0a8 + 00c7 + 0011 + 005f, the carry added.
        assert_eq!(made[IP_BYTES + 4..], [0, 0x5f, 0x82, 0x89]);
    }
}
