//! What a link is like, and how it is written: `200mbit,40ms,0.5%,queue=50ms,down.rate=20mbit`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A link between two sites, each direction with its own nature.
///
/// Written as comma-separated items. The first three may be plain values, in the order rate,
/// one-way delay, loss; all others are `key=value`. A key applies to both directions unless it is
/// prefixed by `up.` (site A to site B: agent to target) or `down.`.
///
/// | key | value | default |
/// | --- | --- | --- |
/// | `rate` | `50kbit`, `200mbit`, `1gbit`: bits of IP packets a second | none, must be given |
/// | `delay` | one way, `40ms`, `250us`, `1s` | 0 |
/// | `loss` | `0.5%`: packets lost on the wire, independently | 0 |
/// | `queue` | the longest a packet may wait before it is dropped | `50ms` |
/// | `jitter` | up to this much more delay, evenly spread, order kept | 0 |
/// | `reorder` | `1%`: packets held back by `reorder_by`, so that later ones overtake them | 0 |
/// | `reorder_by` | how long those are held back | `2ms` |
/// | `duplicate` | `0.1%`: packets that arrive twice | 0 |
/// | `blackout` | `20s+5s`: 20 s up and 5 s dark, again and again, from the first packet on | never dark |
/// | `blackhole` | packets above this many bytes vanish without a word | none |
/// | `mtu` | of both devices, in bytes (no direction) | 1420 |
/// | `seed` | of every random choice (no direction) | 1 |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkSpec {
    /// Site A to site B.
    pub up: DirectionSpec,
    /// Site B to site A.
    pub down: DirectionSpec,
    /// MTU of both TUN devices; 1420 is what a WireGuard tunnel over Ethernet leaves.
    pub mtu_bytes: u16,
    /// Decides every random choice of the link.
    pub seed: u64,
}

/// One direction of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectionSpec {
    /// Serialisation rate of the bottleneck, counted over whole IP packets.
    pub rate: BitRate,
    /// Propagation delay, one way, on top of queueing and serialisation.
    pub delay: Duration,
    /// Share of packets lost after the bottleneck: they have used its capacity.
    pub loss: Probability,
    /// Tail-drop bound: a packet that would have to wait longer is dropped.
    pub queue: Duration,
    /// Evenly distributed extra delay in `0..=jitter`. Order is kept, so at high rates packets
    /// bunch up behind the slowest of their neighbours, as they do behind a busy router.
    pub jitter: Duration,
    /// Share of packets that are held back by `reorder_by`.
    pub reorder: Probability,
    /// How long a reordered packet is held back.
    pub reorder_by: Duration,
    /// Share of packets that arrive twice.
    pub duplicate: Probability,
    /// Larger packets vanish silently although the device's MTU admits them: an MTU black hole.
    pub blackhole_bytes: Option<u16>,
    /// When the line goes dark by itself.
    pub blackout: Option<Blackout>,
}

/// A line that is up for a time and dark for a time, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blackout {
    /// How long it is up, first.
    pub up: Duration,
    /// How long it is dark then; more than 0.
    pub dark: Duration,
}

impl Blackout {
    /// Whether the line is dark this long after its first packet.
    pub fn is_dark(self, age: Duration) -> bool {
        let (up, dark) = (self.up.as_nanos(), self.dark.as_nanos());
        age.as_nanos() % (up + dark).max(1) >= up
    }
}

impl FromStr for Blackout {
    type Err = LinkSpecError;

    fn from_str(text: &str) -> Result<Self, LinkSpecError> {
        let time = |text| parse_duration("blackout", text).ok();
        text.split_once('+')
            .and_then(|(up, dark)| Some(Self { up: time(up)?, dark: time(dark)? }))
            .filter(|blackout| !blackout.dark.is_zero())
            .ok_or_else(|| wrong("blackout", text, "a time up and a time dark such as 20s+5s"))
    }
}

impl DirectionSpec {
    /// A line with this rate and no other fault than a queue of 50 ms.
    pub fn with_rate(rate: BitRate) -> Self {
        Self {
            rate,
            delay: Duration::ZERO,
            loss: Probability::ZERO,
            queue: QUEUE_DEFAULT,
            jitter: Duration::ZERO,
            reorder: Probability::ZERO,
            reorder_by: REORDER_BY_DEFAULT,
            duplicate: Probability::ZERO,
            blackhole_bytes: None,
            blackout: None,
        }
    }

    /// False when the key is not one of a direction's.
    fn set(&mut self, key: &str, value: &str) -> Result<bool, LinkSpecError> {
        match key {
            "rate" => self.rate = value.parse()?,
            "delay" => self.delay = parse_duration(key, value)?,
            "loss" => self.loss = value.parse()?,
            "queue" => self.queue = parse_duration(key, value)?,
            "jitter" => self.jitter = parse_duration(key, value)?,
            "reorder" => self.reorder = value.parse()?,
            "reorder_by" => self.reorder_by = parse_duration(key, value)?,
            "duplicate" => self.duplicate = value.parse()?,
            "blackhole" => self.blackhole_bytes = Some(parse_packet_size(key, value)?),
            "blackout" => self.blackout = Some(value.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    }
}

impl FromStr for LinkSpec {
    type Err = LinkSpecError;

    fn from_str(text: &str) -> Result<Self, LinkSpecError> {
        let mut spec = Self {
            up: DirectionSpec::with_rate(BitRate(0)),
            down: DirectionSpec::with_rate(BitRate(0)),
            mtu_bytes: MTU_DEFAULT_BYTES,
            seed: 1,
        };
        for (place, item) in text.split(',').map(str::trim).enumerate() {
            match item.split_once('=') {
                Some((key, value)) => spec.set(key.trim(), value.trim())?,
                None => {
                    let key = POSITIONAL.get(place).ok_or_else(|| LinkSpecError::NoKey {
                        item: item.to_owned(),
                        place: place + 1,
                    })?;
                    spec.set(key, item)?;
                }
            }
        }
        if spec.up.rate == BitRate(0) || spec.down.rate == BitRate(0) {
            return Err(LinkSpecError::NoRate);
        }
        Ok(spec)
    }
}

impl LinkSpec {
    fn set(&mut self, key: &str, value: &str) -> Result<(), LinkSpecError> {
        let known = match key.split_once('.') {
            Some(("up", key)) => self.up.set(key, value)?,
            Some(("down", key)) => self.down.set(key, value)?,
            Some(_) => false,
            None => match key {
                "mtu" => {
                    self.mtu_bytes = parse_packet_size(key, value)?;
                    true
                }
                "seed" => {
                    self.seed =
                        value.parse().map_err(|_| wrong(key, value, "a whole number such as 7"))?;
                    true
                }
                _ => self.up.set(key, value)? && self.down.set(key, value)?,
            },
        };
        if known { Ok(()) } else { Err(LinkSpecError::UnknownKey { key: key.to_owned() }) }
    }
}

/// The form that [`LinkSpec::from_str`] reads back to the same link.
impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.up == self.down {
            write!(f, "{}", self.up)?;
        } else {
            let mut separator = "";
            for (prefix, direction) in [("up.", self.up), ("down.", self.down)] {
                for item in direction.items() {
                    write!(f, "{separator}{prefix}{item}")?;
                    separator = ",";
                }
            }
        }
        write!(f, ",mtu={},seed={}", self.mtu_bytes, self.seed)
    }
}

impl fmt::Display for DirectionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.items().join(","))
    }
}

impl DirectionSpec {
    fn items(&self) -> Vec<String> {
        let mut items = vec![
            format!("rate={}", self.rate),
            format!("delay={}us", self.delay.as_micros()),
            format!("loss={}", self.loss),
            format!("queue={}us", self.queue.as_micros()),
        ];
        if !self.jitter.is_zero() {
            items.push(format!("jitter={}us", self.jitter.as_micros()));
        }
        if self.reorder != Probability::ZERO {
            items.push(format!("reorder={}", self.reorder));
        }
        if self.reorder_by != REORDER_BY_DEFAULT {
            items.push(format!("reorder_by={}us", self.reorder_by.as_micros()));
        }
        if self.duplicate != Probability::ZERO {
            items.push(format!("duplicate={}", self.duplicate));
        }
        if let Some(bytes) = self.blackhole_bytes {
            items.push(format!("blackhole={bytes}"));
        }
        if let Some(Blackout { up, dark }) = self.blackout {
            items.push(format!("blackout={}us+{}us", up.as_micros(), dark.as_micros()));
        }
        items
    }
}

/// Bits a second, between 1 kbit/s and 100 Gbit/s when parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BitRate(pub u64);

impl FromStr for BitRate {
    type Err = LinkSpecError;

    fn from_str(text: &str) -> Result<Self, LinkSpecError> {
        let lower = text.to_ascii_lowercase();
        let plain = lower.strip_suffix("/s").unwrap_or(&lower);
        [("gbit", 9), ("mbit", 6), ("kbit", 3), ("bit", 0)]
            .into_iter()
            .find_map(|(unit, digits)| parse_decimal(plain.strip_suffix(unit)?, digits))
            .filter(|bits| (1_000..=100_000_000_000).contains(bits))
            .map(Self)
            .ok_or_else(|| wrong("rate", text, "a rate from 1kbit to 100gbit such as 200mbit"))
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bits if bits >= 1_000_000_000 && bits % 1_000_000_000 == 0 => {
                write!(f, "{}gbit", bits / 1_000_000_000)
            }
            bits if bits >= 1_000_000 && bits % 1_000_000 == 0 => {
                write!(f, "{}mbit", bits / 1_000_000)
            }
            bits => write!(f, "{bits}bit"),
        }
    }
}

/// A share of packets, in parts per billion, so that `0.001%` is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probability {
    /// 0 to 1,000,000,000.
    pub parts_per_billion: u32,
}

impl Probability {
    /// Never.
    pub const ZERO: Self = Self { parts_per_billion: 0 };
}

impl FromStr for Probability {
    type Err = LinkSpecError;

    fn from_str(text: &str) -> Result<Self, LinkSpecError> {
        text.strip_suffix('%')
            .and_then(|number| parse_decimal(number, 7))
            .filter(|parts| *parts <= 1_000_000_000)
            .map(|parts| Self { parts_per_billion: parts as u32 })
            .ok_or_else(|| wrong("share", text, "a percentage from 0% to 100% such as 0.5%"))
    }
}

impl fmt::Display for Probability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) =
            (self.parts_per_billion / 10_000_000, self.parts_per_billion % 10_000_000);
        let decimals = format!("{part:07}");
        match decimals.trim_end_matches('0') {
            "" => write!(f, "{whole}%"),
            decimals => write!(f, "{whole}.{decimals}%"),
        }
    }
}

/// Why a link's description was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkSpecError {
    /// A value is not of its key's form, or outside its bounds.
    #[error("link: {key} \"{text}\" is not {expected}")]
    Value {
        /// The key, or the kind of value.
        key: String,
        /// What was written.
        text: String,
        /// What it should look like.
        expected: &'static str,
    },
    /// A key that no link has.
    #[error(
        "link: \"{key}\" is not known; use rate, delay, loss, queue, jitter, reorder, reorder_by, \
         duplicate, blackout or blackhole (each also with up. or down. before it), mtu or seed"
    )]
    UnknownKey {
        /// The key as written.
        key: String,
    },
    /// A plain value where only `key=value` is possible.
    #[error("link: item {place} \"{item}\" needs a key, such as queue=50ms")]
    NoKey {
        /// The item as written.
        item: String,
        /// Its place, from 1.
        place: usize,
    },
    /// A direction has no rate.
    #[error("link: each direction needs a rate; begin with one such as 200mbit")]
    NoRate,
}

fn wrong(key: &str, text: &str, expected: &'static str) -> LinkSpecError {
    LinkSpecError::Value { key: key.to_owned(), text: text.to_owned(), expected }
}

fn parse_duration(key: &str, text: &str) -> Result<Duration, LinkSpecError> {
    [("ms", 3), ("us", 0), ("s", 6)]
        .into_iter()
        .find_map(|(unit, digits)| parse_decimal(text.strip_suffix(unit)?, digits))
        .filter(|micros| *micros <= DELAY_MAX_MICROS)
        .map(Duration::from_micros)
        .ok_or_else(|| wrong(key, text, "a time up to 60s such as 40ms, 250us or 1.5s"))
}

fn parse_packet_size(key: &str, text: &str) -> Result<u16, LinkSpecError> {
    text.parse()
        .ok()
        .filter(|bytes| (MTU_MIN_BYTES..=MTU_MAX_BYTES).contains(bytes))
        .ok_or_else(|| wrong(key, text, "a packet size from 576 to 9000 bytes"))
}

/// `text` × 10^`digits` as a whole number; `None` for anything that is not exactly one.
fn parse_decimal(text: &str, digits: usize) -> Option<u64> {
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || part.len() > digits || !all_digits(whole) || !all_digits(part) {
        return None;
    }
    format!("{whole}{part:0<digits$}").parse().ok()
}

const POSITIONAL: [&str; 3] = ["rate", "delay", "loss"];
const QUEUE_DEFAULT: Duration = Duration::from_millis(50);
const REORDER_BY_DEFAULT: Duration = Duration::from_millis(2);
const MTU_DEFAULT_BYTES: u16 = 1420;
/// What every IPv4 host must be able to receive.
const MTU_MIN_BYTES: u16 = 576;
const MTU_MAX_BYTES: u16 = 9000;
/// Longer than any path, short enough that clock arithmetic cannot overflow.
const DELAY_MAX_MICROS: u64 = 60_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_sets_both_directions() {
        let spec: LinkSpec = "200mbit,40ms,0.5%".parse().unwrap();
        assert_eq!(spec.up, spec.down);
        assert_eq!(spec.up.rate, BitRate(200_000_000));
        assert_eq!(spec.up.delay, Duration::from_millis(40));
        assert_eq!(spec.up.loss.parts_per_billion, 5_000_000);
        assert_eq!(spec.up.queue, Duration::from_millis(50));
        assert_eq!(spec.mtu_bytes, 1420);
        assert_eq!("1.5gbit".parse::<LinkSpec>().unwrap().down.rate, BitRate(1_500_000_000));
    }

    #[test]
    fn keys_and_directions_are_told_apart_and_printed_so_that_they_read_back() {
        let text = "200Mbit/s,40ms,0.5%,queue=20ms,up.jitter=2ms,down.rate=20mbit,mtu=1300,\
                    reorder=1%,up.reorder_by=500us,duplicate=0.0000001%,down.blackhole=1280,up.blackout=20s+500ms,seed=9";
        let spec: LinkSpec = text.parse().unwrap();
        assert_eq!(spec.down.rate, BitRate(20_000_000));
        assert_eq!(spec.up.jitter, Duration::from_millis(2));
        assert_eq!(spec.down.jitter, Duration::ZERO);
        assert_eq!(spec.up.duplicate.parts_per_billion, 1);
        assert_eq!(spec.down.blackhole_bytes, Some(1280));
        let (up, dark) = (Duration::from_secs(20), Duration::from_millis(500));
        assert_eq!((spec.up.blackout, spec.down.blackout), (Some(Blackout { up, dark }), None));
        assert_eq!(spec.to_string().parse::<LinkSpec>().unwrap(), spec);
        let plain: LinkSpec = "50mbit".parse().unwrap();
        assert_eq!(plain.to_string().parse::<LinkSpec>().unwrap(), plain);
        assert_eq!(
            "up.rate=5mbit,down.rate=1mbit".parse::<LinkSpec>().unwrap().up.rate.0,
            5_000_000
        );
    }

    #[test]
    fn mistakes_are_named() {
        let error = |text: &str| text.parse::<LinkSpec>().unwrap_err().to_string();
        assert_eq!(
            error("200"),
            "link: rate \"200\" is not a rate from 1kbit to 100gbit such as 200mbit"
        );
        assert!(error("").contains("rate \"\""));
        assert!(error("200mbit,40").contains("delay \"40\" is not a time"));
        assert!(error("200mbit,40ms,0.5").contains("\"0.5\" is not a percentage"));
        assert!(error("200mbit,40ms,101%").contains("percentage"));
        assert!(error("200mbit,40ms,0.5%,9").contains("item 4 \"9\" needs a key"));
        assert!(error("200mbit,latency=4ms").contains("\"latency\" is not known"));
        assert!(error("200mbit,left.delay=4ms").contains("\"left.delay\" is not known"));
        assert!(error("delay=4ms").contains("needs a rate"));
        assert!(error("up.rate=4mbit").contains("needs a rate"));
        assert!(error("200mbit,mtu=99").contains("576"));
        assert!(error("99999999999999999999gbit").contains("rate"));
        assert!(error("200mbit,-4ms").contains("time"));
        assert!(error("200mbit,61s").contains("60s"));
        assert!(error("200mbit,blackout=5s").contains("\"5s\" is not a time up and a time dark"));
        assert!(error("200mbit,blackout=5s+0s").contains("a time dark"));
    }
}
