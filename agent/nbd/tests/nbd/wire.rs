//! What goes over the wire, byte by byte, against proto.md.

use std::sync::Arc;

use backhaul_nbd::Errno;
use backhaul_nbd::protocol::*;

use crate::common::{KIB, MIB, Site, noise};
use crate::memory::Memory;
use crate::raw::{Message, Raw, info, meta, option_bytes, string};

/// A server with `disk` of 1 MiB and minimum block 512, and `frozen`, which is read-only.
async fn site() -> Site {
    let site = Site::new().await;
    let mut disk = Memory::new(MIB);
    disk.minimum = 512;
    site.export("disk", Arc::new(disk));
    let mut frozen = Memory::new(MIB);
    frozen.read_only = true;
    site.export("frozen", Arc::new(frozen));
    site
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused_and_haggling_goes_on() {
    let site = site().await;
    let mut raw = Raw::greeted(&site.socket()).await;
    let long = vec![0; OPTION_BYTES_MAX as usize + 1];
    let malformed = [&string("disk")[..], &9u16.to_be_bytes()].concat();
    let lying = [&u32::MAX.to_be_bytes()[..], b"disk\0\0"].concat();
    let queries = [&string("disk")[..], &u32::MAX.to_be_bytes()].concat();
    let not_utf8 = [&4u32.to_be_bytes()[..], &[0xff; 4], &[0; 2]].concat();
    let huge = info(&"x".repeat(4097), &[]);
    let absent = info("absent", &[]);
    let selection = meta("disk", &[BASE_ALLOCATION]);
    for (option, data, wanted) in [
        (0x1234, &b"whatever"[..], REP_ERR_UNSUP),
        (OPT_STARTTLS, b"", REP_ERR_UNSUP),
        (OPT_LIST, b"x", REP_ERR_INVALID),
        (OPT_STRUCTURED_REPLY, b"x", REP_ERR_INVALID),
        (OPT_LIST, &long, REP_ERR_TOO_BIG),
        (OPT_GO, b"", REP_ERR_INVALID),
        (OPT_GO, &malformed, REP_ERR_INVALID),
        (OPT_INFO, &lying, REP_ERR_INVALID),
        (OPT_INFO, &not_utf8, REP_ERR_INVALID),
        (OPT_GO, &huge, REP_ERR_INVALID),
        (OPT_GO, &absent, REP_ERR_UNKNOWN),
        (OPT_SET_META_CONTEXT, &selection, REP_ERR_INVALID),
        (OPT_LIST_META_CONTEXT, &selection, REP_ERR_INVALID),
    ] {
        let replies = raw.option(option, data).await;
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].0, wanted, "option {option} with {} bytes", data.len());
    }
    assert_eq!(raw.option(OPT_STRUCTURED_REPLY, b"").await, [(REP_ACK, vec![])]);
    assert_eq!(raw.option(OPT_SET_META_CONTEXT, &queries).await[0].0, REP_ERR_INVALID);
    let absent = meta("absent", &[BASE_ALLOCATION]);
    assert_eq!(raw.option(OPT_SET_META_CONTEXT, &absent).await[0].0, REP_ERR_UNKNOWN);
    assert_eq!(raw.option(OPT_ABORT, b"").await, [(REP_ACK, vec![])]);
    assert!(raw.at_end().await);
}

#[tokio::test]
async fn a_refusal_names_the_export_and_stays_within_the_longest_string() {
    let site = site().await;
    let mut raw = Raw::greeted(&site.socket()).await;
    let replies = raw.option(OPT_GO, &info("windows", &[])).await;
    assert!(String::from_utf8_lossy(&replies[0].1).contains("windows"));
    let replies = raw.option(OPT_GO, &info(&"ß".repeat(2048), &[])).await;
    assert!(str::from_utf8(&replies[0].1).unwrap().len() <= STRING_BYTES_MAX);
}

#[tokio::test]
async fn an_export_tells_its_size_flags_blocks_name_and_description() {
    let site = site().await;
    let mut raw = Raw::greeted(&site.socket()).await;
    let flags =
        |replies: &[(u32, Vec<u8>)]| u16::from_be_bytes([replies[0].1[10], replies[0].1[11]]);

    let wanted = info("disk", &[INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, 77]);
    let replies = raw.option(OPT_INFO, &wanted).await;
    assert_eq!(replies[0].1[..10], [&[0, 0][..], &MIB.to_be_bytes()].concat());
    assert_eq!(flags(&replies) & TRANSMIT_SEND_DF, 0, "DF belongs to structured replies");
    let blocks = [512u32, 4096, PAYLOAD_BYTES_MAX].map(u32::to_be_bytes).concat();
    let facts = [
        [&INFO_BLOCK_SIZE.to_be_bytes()[..], &blocks].concat(),
        [&INFO_NAME.to_be_bytes()[..], b"disk"].concat(),
        [&INFO_DESCRIPTION.to_be_bytes()[..], b"a disk in memory"].concat(),
    ];
    assert_eq!(replies[1..4], facts.map(|fact| (REP_INFO, fact)));
    assert_eq!(replies[4..], [(REP_ACK, vec![])]);

    raw.option(OPT_STRUCTURED_REPLY, b"").await;
    let disk = flags(&raw.option(OPT_INFO, &info("disk", &[])).await);
    for flag in [
        TRANSMIT_HAS_FLAGS,
        TRANSMIT_SEND_FLUSH,
        TRANSMIT_SEND_FUA,
        TRANSMIT_SEND_TRIM,
        TRANSMIT_SEND_WRITE_ZEROES,
        TRANSMIT_SEND_DF,
        TRANSMIT_CAN_MULTI_CONN,
        TRANSMIT_SEND_FAST_ZERO,
    ] {
        assert_ne!(disk & flag, 0, "flag {flag:#x}");
    }
    assert_eq!(disk & TRANSMIT_READ_ONLY, 0);
    let frozen = flags(&raw.option(OPT_INFO, &info("frozen", &[])).await);
    assert_ne!(frozen & TRANSMIT_READ_ONLY, 0);
    // Haggling goes on after INFO, and ends with GO.
    raw.option(OPT_GO, &info("disk", &[])).await;
    raw.ask(0, CMD_FLUSH, 1, 0, 0).await;
    assert_eq!(raw.errno(1).await, 0);
}

#[tokio::test]
async fn the_old_way_to_choose_an_export_works_with_and_without_zeroes() {
    let site = site().await;
    for (client_flags, len) in [(1u32, 134), (3, 10)] {
        let mut raw = Raw::connect(&site.socket()).await;
        raw.send(&client_flags.to_be_bytes()).await;
        raw.send(&option_bytes(OPT_EXPORT_NAME, b"disk")).await;
        let mut reply = vec![0; len];
        tokio::io::AsyncReadExt::read_exact(&mut raw.stream, &mut reply).await.unwrap();
        assert_eq!(reply[..8], MIB.to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        raw.ask(0, CMD_READ, 9, 0, 512).await;
        let data = vec![0; 512];
        assert_eq!(raw.message().await.unwrap(), Message::Simple { cookie: 9, errno: 0, data });
    }
    let mut raw = Raw::greeted(&site.socket()).await;
    raw.send(&option_bytes(OPT_EXPORT_NAME, b"absent")).await;
    assert!(raw.at_end().await);
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_dropped() {
    let site = site().await;
    let mut raw = Raw::connect(&site.socket()).await;
    raw.send(&4u32.to_be_bytes()).await;
    assert!(raw.at_end().await, "flags that were not offered");
    let mut raw = Raw::greeted(&site.socket()).await;
    raw.send(&[0; 16]).await;
    assert!(raw.at_end().await, "an option without magic");
    let mut raw = Raw::chosen(&site.socket(), "disk", false).await;
    raw.send(&[0; REQUEST_BYTES]).await;
    assert!(raw.at_end().await, "a request without magic");
}

#[tokio::test]
async fn every_wrong_request_has_its_error_and_costs_nothing_else() {
    let site = site().await;
    let over = PAYLOAD_BYTES_MAX + 512;
    for extended in [false, true] {
        let mut raw = Raw::chosen(&site.socket(), "disk", extended).await;
        let df = if extended { 0 } else { Errno::EINVAL.0 };
        for (cookie, (flags, command, offset, len, wanted)) in [
            (0, CMD_READ, MIB, 512, Errno::EINVAL.0),
            (0, CMD_READ, MIB - 512, 1024, Errno::EINVAL.0),
            (0, CMD_READ, u64::MAX - 511, 512, Errno::EINVAL.0),
            (0, CMD_WRITE, MIB, 512, Errno::ENOSPC.0),
            (0, CMD_TRIM, MIB, 512, Errno::ENOSPC.0),
            (0, CMD_WRITE_ZEROES, MIB, 512, Errno::ENOSPC.0),
            (0, CMD_READ, 1, 512, Errno::EINVAL.0),
            (0, CMD_READ, 0, 100, Errno::EINVAL.0),
            (0, CMD_WRITE, 100, 512, Errno::EINVAL.0),
            (0, CMD_READ, 0, 0, Errno::EINVAL.0),
            (0, CMD_WRITE, 0, 0, Errno::EINVAL.0),
            (0, CMD_READ, 0, over, Errno::EOVERFLOW.0),
            (0, CMD_READ, 0, u32::MAX, Errno::EOVERFLOW.0),
            (0, CMD_WRITE, 0, over, Errno::EOVERFLOW.0),
            (0, 99, 0, 512, Errno::EINVAL.0),
            (1 << 15, CMD_READ, 0, 512, Errno::EINVAL.0),
            (CMD_FLAG_NO_HOLE, CMD_WRITE, 0, 512, Errno::EINVAL.0),
            (CMD_FLAG_DF, CMD_READ, 0, 512, df),
            (CMD_FLAG_FAST_ZERO, CMD_WRITE_ZEROES, 0, 512, Errno::ENOTSUP.0),
            (CMD_FLAG_FUA, CMD_READ, 0, 512, 0),
            (CMD_FLAG_FUA, CMD_FLUSH, 0, 0, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let cookie = cookie as u64;
            raw.ask(flags, command, cookie, offset, len).await;
            if command == CMD_WRITE {
                raw.send(&vec![0xee; len as usize]).await;
            }
            let errno = raw.errno(cookie).await;
            assert_eq!(errno, wanted, "command {command} flags {flags} at {offset} len {len}");
        }
    }
    let mut raw = Raw::chosen(&site.socket(), "frozen", true).await;
    for (cookie, command) in [(1, CMD_WRITE), (2, CMD_TRIM), (3, CMD_WRITE_ZEROES)] {
        raw.ask(0, command, cookie, 0, 4096).await;
        if command == CMD_WRITE {
            raw.send(&[0xee; 4096]).await;
        }
        let Message::Chunk { kind, data, .. } = raw.message().await.unwrap() else {
            panic!("structured errors carry a text");
        };
        assert_eq!((kind, &data[..4]), (REPLY_TYPE_ERROR, &Errno::EPERM.0.to_be_bytes()[..]));
        assert_eq!(&data[6..], b"the export is read-only");
        assert_eq!(usize::from(data[5]), data.len() - 6);
    }
    // None of the refused payloads reached a disk.
    for name in ["disk", "frozen"] {
        let data = site.client(name).await.read(0, MIB as u32).await.unwrap();
        assert!(data.iter().all(|byte| *byte == 0), "{name}");
    }
}

#[tokio::test]
async fn block_status_needs_its_context_on_the_same_export() {
    let site = site().await;
    let mut raw = Raw::greeted(&site.socket()).await;
    raw.option(OPT_STRUCTURED_REPLY, b"").await;
    let context = |id: u32| [&id.to_be_bytes()[..], BASE_ALLOCATION.as_bytes()].concat();
    for queries in [&[][..], &["base:"], &[BASE_ALLOCATION, "x-other:thing"]] {
        let listed = raw.option(OPT_LIST_META_CONTEXT, &meta("disk", queries)).await;
        assert_eq!(listed, [(REP_META_CONTEXT, context(0)), (REP_ACK, vec![])], "{queries:?}");
    }
    for queries in [&[][..], &["base:"], &["qemu:dirty-bitmap:x"]] {
        let set = raw.option(OPT_SET_META_CONTEXT, &meta("disk", queries)).await;
        assert_eq!(set, [(REP_ACK, vec![])], "{queries:?}");
    }
    let set = raw.option(OPT_SET_META_CONTEXT, &meta("frozen", &[BASE_ALLOCATION])).await;
    assert_eq!(set[0], (REP_META_CONTEXT, context(1)));
    raw.option(OPT_GO, &info("disk", &[])).await;
    raw.ask(0, CMD_BLOCK_STATUS, 1, 0, 4096).await;
    assert_eq!(raw.errno(1).await, Errno::EINVAL.0);
}

/// 1 MiB with data in [64 KiB, 128 KiB) and [256 KiB, 260 KiB), holes elsewhere.
async fn holey(site: &Site) -> Vec<u8> {
    let client = site.client("disk").await;
    let mut expected = vec![0; MIB as usize];
    for (at, len) in [(64 * KIB, 64 * KIB), (256 * KIB, 4 * KIB)] {
        let data = noise(at, len as usize);
        expected[at as usize..(at + len) as usize].copy_from_slice(&data);
        client.write(at, data.into(), false).await.unwrap();
    }
    expected
}

#[tokio::test]
async fn extents_are_joined_end_with_the_request_and_come_alone_when_asked() {
    let site = site().await;
    holey(&site).await;
    let mut raw = Raw::chosen(&site.socket(), "disk", true).await;
    let (hole, data) = (STATE_HOLE | STATE_ZERO, 0);
    let k = KIB as u32;
    let all = [(64 * k, hole), (64 * k, data), (128 * k, hole), (4 * k, data), (764 * k, hole)];
    for (flags, offset, len, wanted) in [
        (0, 0, MIB as u32, &all[..]),
        (CMD_FLAG_REQ_ONE, 0, MIB as u32, &all[..1]),
        (CMD_FLAG_REQ_ONE, 512, 1024, &[(1024, hole)]),
        (0, 512, 64 * k, &[(64 * k - 512, hole), (512, data)]),
    ] {
        raw.ask(flags, CMD_BLOCK_STATUS, 5, offset, len).await;
        let mut payload = 1u32.to_be_bytes().to_vec();
        for (len, state) in wanted {
            payload.extend([len.to_be_bytes(), state.to_be_bytes()].concat());
        }
        let (cookie, kind) = (5, REPLY_TYPE_BLOCK_STATUS);
        let wanted = Message::Chunk { cookie, flags: REPLY_FLAG_DONE, kind, data: payload };
        assert_eq!(raw.message().await.unwrap(), wanted);
    }
}

#[tokio::test]
async fn a_read_leaves_out_holes_unless_it_must_not() {
    let site = site().await;
    let expected = holey(&site).await;
    let mut raw = Raw::chosen(&site.socket(), "disk", true).await;

    raw.ask(0, CMD_READ, 1, 0, MIB as u32).await;
    let mut got = vec![0xaa; MIB as usize];
    let mut kinds = Vec::new();
    loop {
        let Message::Chunk { cookie: 1, flags, kind, data } = raw.message().await.unwrap() else {
            panic!("a simple reply");
        };
        kinds.push(kind);
        if kind != REPLY_TYPE_NONE {
            let at = u64::from_be_bytes(*data.first_chunk().unwrap()) as usize;
            match kind {
                REPLY_TYPE_OFFSET_DATA => {
                    got[at..at + data.len() - 8].copy_from_slice(&data[8..]);
                }
                REPLY_TYPE_OFFSET_HOLE => {
                    let len = u32::from_be_bytes(*data.last_chunk().unwrap()) as usize;
                    got[at..at + len].fill(0);
                }
                _ => panic!("chunk {kind}"),
            }
        }
        if flags & REPLY_FLAG_DONE != 0 {
            break;
        }
    }
    assert_eq!(kinds, [2, 1, 2, 1, 2, 0]);
    assert!(got == expected);

    raw.ask(CMD_FLAG_DF, CMD_READ, 2, 0, MIB as u32).await;
    let data = [&0u64.to_be_bytes()[..], &expected].concat();
    let (flags, kind) = (REPLY_FLAG_DONE, REPLY_TYPE_OFFSET_DATA);
    assert!(raw.message().await.unwrap() == Message::Chunk { cookie: 2, flags, kind, data });

    let mut simple = Raw::chosen(&site.socket(), "disk", false).await;
    simple.ask(0, CMD_READ, 3, 0, MIB as u32).await;
    let wanted = Message::Simple { cookie: 3, errno: 0, data: expected };
    assert!(simple.message().await.unwrap() == wanted);
}

#[tokio::test]
async fn what_was_asked_before_a_goodbye_is_answered() {
    let site = site().await;
    for hang_up in [false, true] {
        let mut raw = Raw::chosen(&site.socket(), "disk", false).await;
        for cookie in 0..64 {
            raw.ask(0, CMD_READ, cookie, cookie * 512, 512).await;
        }
        if hang_up {
            tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await.unwrap();
        } else {
            raw.ask(0, CMD_DISC, 64, 0, 0).await;
        }
        let mut cookies = Vec::new();
        while let Ok(message) = raw.message().await {
            cookies.push(message.cookie());
        }
        cookies.sort_unstable();
        assert_eq!(cookies, Vec::from_iter(0..64));
    }
}
