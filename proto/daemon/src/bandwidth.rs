//! Bandwidth limits with a weekly schedule: `50 Mbit/s mon-fri 08:00-18:00 Europe/Berlin`.

use std::fmt;
use std::str::FromStr;

pub use jiff::Timestamp;
use jiff::civil::{Time, Weekday};
use jiff::tz::TimeZone;
use toml::de::DeValue;

use crate::config::FromValue;

/// Names of the days, in the order of [`Days`].
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// A rate of data, written in bits: `50 Mbit/s`, `1.5 Gbit/s`, `800 kbit/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate {
    /// Bits a second, from 8,000 to 10^12.
    pub bits_per_second: u64,
}

impl Rate {
    /// Bytes a second.
    pub fn bytes_per_second(self) -> u64 {
        self.bits_per_second / 8
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a rate such as \"50 Mbit/s\"");
        let units = [("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9), ("bit/s", 1.0)];
        let (number, factor) = units
            .iter()
            .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
            .ok_or_else(wrong)?;
        let number: f64 = number.trim().parse().map_err(|_| wrong())?;
        let bits = number * factor;
        if (8e3..=1e12).contains(&bits) {
            Ok(Self { bits_per_second: bits as u64 })
        } else {
            Err(format!("`{text}` is out of bounds: a rate lies between 8 kbit/s and 1000 Gbit/s"))
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bits_per_second as f64 {
            bits if bits >= 1e9 => write!(f, "{} Gbit/s", bits / 1e9),
            bits if bits >= 1e6 => write!(f, "{} Mbit/s", bits / 1e6),
            bits => write!(f, "{} kbit/s", bits / 1e3),
        }
    }
}

impl FromValue for Rate {
    const EXPECTED: &'static str = "a rate such as \"50 Mbit/s\"";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        value.as_str().map(str::parse)
    }
}

/// A ceiling that holds at certain times of the week.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    /// `None`: no ceiling.
    rate: Option<Rate>,
    /// Monday first.
    days: [bool; 7],
    /// From, and up to but without; all day when absent. When the end is not after the beginning,
    /// the span reaches into the next day.
    span: Option<(Time, Time)>,
    zone: TimeZone,
}

impl Rule {
    fn applies(&self, at: Timestamp) -> bool {
        let now = at.to_zoned(self.zone.clone());
        let today = day_index(now.weekday());
        let yesterday = (today + 6) % 7;
        let time = now.time();
        match self.span {
            None => self.days[today],
            Some((from, to)) if from < to => self.days[today] && from <= time && time < to,
            Some((from, to)) => {
                (self.days[today] && time >= from) || (self.days[yesterday] && time < to)
            }
        }
    }
}

fn day_index(day: Weekday) -> usize {
    usize::try_from(day.to_monday_zero_offset()).unwrap_or_default()
}

impl FromStr for Rule {
    type Err = String;

    /// `RATE [DAYS] [FROM-TO] [ZONE]`; the rate may be `unlimited`, days are `mon-fri`, `sat,sun` or
    /// `daily`, and the zone is an IANA name (the host's own when absent).
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace().peekable();
        let first = words.next().unwrap_or_default();
        let rate = match first {
            "unlimited" => None,
            number => {
                // The unit may stand apart from its number.
                let unit = words.next_if(|word| word.ends_with("bit/s")).unwrap_or_default();
                Some(format!("{number}{unit}").parse::<Rate>()?)
            }
        };
        let mut rule = Self { rate, days: [true; 7], span: None, zone: TimeZone::system() };
        if let Some(days) = words.next_if(|word| is_days(word)) {
            rule.days = parse_days(days)?;
        }
        if let Some(span) = words.next_if(|word| word.starts_with(|c: char| c.is_ascii_digit())) {
            rule.span = Some(parse_span(span)?);
        }
        if let Some(zone) = words.next() {
            rule.zone = TimeZone::get(zone)
                .map_err(|_| format!("`{zone}` is not a time zone such as \"Europe/Berlin\""))?;
        }
        match words.next() {
            None => Ok(rule),
            Some(word) => Err(format!(
                "`{word}` is too much; a limit is written as \"50 Mbit/s mon-fri 08:00-18:00 Europe/Berlin\""
            )),
        }
    }
}

fn is_days(word: &str) -> bool {
    word == "daily" || DAYS.contains(&word.get(..3).unwrap_or_default()) && !word.contains('/')
}

fn parse_days(text: &str) -> Result<[bool; 7], String> {
    if text == "daily" {
        return Ok([true; 7]);
    }
    let index = |name: &str| {
        let found = DAYS.iter().position(|day| *day == name);
        found.ok_or_else(|| format!("`{name}` is not a day; days are {}", DAYS.join(", ")))
    };
    let mut days = [false; 7];
    for item in text.split(',') {
        let (from, to) = item.split_once('-').unwrap_or((item, item));
        let (mut day, last) = (index(from)?, index(to)?);
        days[day] = true;
        while day != last {
            day = (day + 1) % 7;
            days[day] = true;
        }
    }
    Ok(days)
}

fn parse_span(text: &str) -> Result<(Time, Time), String> {
    let wrong = || format!("`{text}` is not a span of time such as \"08:00-18:00\"");
    let time = |text: &str| {
        // The end of the day is the beginning of the next.
        let text = if text == "24:00" { "00:00" } else { text };
        Time::strptime("%H:%M", text).map_err(|_| wrong())
    };
    let (from, to) = text.split_once('-').ok_or_else(wrong)?;
    Ok((time(from)?, time(to)?))
}

/// Ceilings in order; the first that applies counts, and none is no ceiling.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BandwidthLimits(Vec<Rule>);

impl BandwidthLimits {
    /// Reads rules such as `50 Mbit/s mon-fri 08:00-18:00 Europe/Berlin`.
    pub fn parse(rules: &[impl AsRef<str>]) -> Result<Self, String> {
        rules.iter().map(|rule| rule.as_ref().parse()).collect::<Result<_, _>>().map(Self)
    }

    /// The ceiling at a moment.
    pub fn at(&self, moment: Timestamp) -> Option<Rate> {
        self.0.iter().find(|rule| rule.applies(moment)).and_then(|rule| rule.rate)
    }

    /// The ceiling now, by the system's clock.
    pub fn now(&self) -> Option<Rate> {
        self.at(Timestamp::now())
    }
}

impl FromValue for BandwidthLimits {
    const EXPECTED: &'static str =
        "a limit such as \"50 Mbit/s mon-fri 08:00-18:00 Europe/Berlin\", or a list of them";
    fn from_value(value: &DeValue<'_>) -> Option<Result<Self, String>> {
        let rules = match value.as_str() {
            Some(text) => vec![text.to_owned()],
            None => Vec::<String>::from_value(value)?.unwrap_or_default(),
        };
        Some(Self::parse(&rules))
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::{BandwidthLimits, Rate, Rule};

    fn limits(rules: &[&str]) -> BandwidthLimits {
        BandwidthLimits::parse(rules).unwrap()
    }

    fn mbit(limits: &BandwidthLimits, at: &str) -> Option<u64> {
        limits.at(at.parse::<Timestamp>().unwrap()).map(|rate| rate.bits_per_second / 1_000_000)
    }

    #[test]
    fn working_hours_are_those_of_the_zone_also_in_summer() {
        let office = limits(&["50 Mbit/s mon-fri 08:00-18:00 Europe/Berlin"]);
        // Monday 2026-01-05: Berlin is one hour ahead; 2026-07-06: two.
        assert_eq!(mbit(&office, "2026-01-05T06:59:59Z"), None);
        assert_eq!(mbit(&office, "2026-01-05T07:00:00Z"), Some(50));
        assert_eq!(mbit(&office, "2026-01-05T17:00:00Z"), None);
        assert_eq!(mbit(&office, "2026-07-06T06:00:00Z"), Some(50));
        assert_eq!(mbit(&office, "2026-07-06T05:59:59Z"), None);
        assert_eq!(mbit(&office, "2026-01-10T10:00:00Z"), None, "a Saturday");
    }

    #[test]
    fn the_first_that_applies_counts_and_a_night_belongs_to_the_day_it_begins() {
        let night = limits(&["unlimited fri 22:00-06:00 UTC", "20Mbit/s"]);
        assert_eq!(mbit(&night, "2026-01-09T21:59:00Z"), Some(20));
        assert_eq!(mbit(&night, "2026-01-09T22:00:00Z"), None);
        assert_eq!(mbit(&night, "2026-01-10T05:59:00Z"), None);
        assert_eq!(mbit(&night, "2026-01-10T06:00:00Z"), Some(20));
        assert_eq!(mbit(&night, "2026-01-09T05:00:00Z"), Some(20), "Thursday's night");
    }

    #[test]
    fn days_may_be_lists_and_wrap_around_the_week() {
        let weekend = limits(&["5 Mbit/s sat-mon,wed UTC"]);
        let of = |day: u32| mbit(&weekend, &format!("2026-01-{:02}T12:00:00Z", day + 5));
        let days: Vec<_> = (0..7).map(|day| of(day).is_some()).collect();
        assert_eq!(days, [true, false, true, false, false, true, true]);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("50 MB/s", "`50` is not a rate"),
            ("fast", "`fast` is not a rate"),
            ("1 bit/s", "out of bounds"),
            ("50 Mbit/s mon-frei", "`frei` is not a day"),
            ("50 Mbit/s 8-18", "`8-18` is not a span"),
            ("50 Mbit/s mon 08:00-18:00 Berlin", "`Berlin` is not a time zone"),
            ("50 Mbit/s UTC and more", "`and` is too much"),
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert_eq!("1.5 Gbit/s".parse::<Rate>().unwrap().to_string(), "1.5 Gbit/s");
    }
}
