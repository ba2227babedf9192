//! No order of calls, no number and no clock makes the core panic or lose its bounds.

use std::time::{Duration, Instant};

use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use proptest::test_runner::Config;

use crate::quic::congestion::ceiling::{Ceiling, RateLimit};
use crate::quic::congestion::flow::Flow;

#[derive(Debug, Clone)]
enum Call {
    Sent(u64),
    Ack { age_micros: u64, bytes: u64 },
    EndAcks { in_flight: u64, app_limited: bool },
    Loss { age_micros: u64, bytes: u64, persistent: bool },
    Mtu(u16),
    Limit(Option<u64>),
    Wait(i64),
    Rtt(u64),
}

fn call() -> impl Strategy<Value = Call> {
    let bytes = || prop_oneof![0u64..20_000, Just(0), 0u64..1 << 40];
    let age = || prop_oneof![0u64..300_000, Just(0), 0u64..1 << 36];
    prop_oneof![
        bytes().prop_map(Call::Sent),
        (age(), bytes()).prop_map(|(age_micros, bytes)| Call::Ack { age_micros, bytes }),
        (bytes(), any::<bool>())
            .prop_map(|(in_flight, app_limited)| Call::EndAcks { in_flight, app_limited }),
        (age(), bytes(), any::<bool>()).prop_map(|(age_micros, bytes, persistent)| Call::Loss {
            age_micros,
            bytes,
            persistent
        }),
        (1200u16..).prop_map(Call::Mtu),
        any::<Option<u64>>().prop_map(Call::Limit),
        (-50_000i64..5_000_000).prop_map(Call::Wait),
        (0u64..1 << 32).prop_map(Call::Rtt),
    ]
}

proptest! {
    #![proptest_config(Config { cases: 200, failure_persistence: None, ..Config::default() })]

    #[test]
    fn the_core_survives_anything(calls in proptest::collection::vec(call(), 1..300)) {
        // Far from the clock's beginning, so that ages can be subtracted.
        let mut now = Instant::now() + Duration::from_secs(1 << 20);
        let mut rtt = Duration::from_millis(50);
        let limit = RateLimit::default();
        let mut flow = Flow::new(now, 1200, 1, None);
        let mut ceiling = Ceiling::new(limit.clone(), 1200, 28);
        for call in calls {
            let ago = |micros| now.checked_sub(Duration::from_micros(micros)).unwrap_or(now);
            match call {
                Call::Sent(bytes) => {
                    ceiling.on_sent(now, bytes);
                    flow.on_sent(now, bytes);
                }
                Call::Ack { age_micros, bytes } => {
                    ceiling.on_ack(now, rtt);
                    flow.on_ack(now, ago(age_micros), bytes, rtt);
                }
                Call::EndAcks { in_flight, app_limited } => {
                    flow.on_end_acks(now, in_flight, app_limited);
                }
                Call::Loss { age_micros, bytes, persistent } => {
                    flow.on_loss(now, ago(age_micros), bytes, persistent);
                }
                Call::Mtu(mtu) => flow.on_mtu(mtu),
                Call::Limit(rate) => limit.set(rate),
                Call::Wait(micros) if micros < 0 => now = ago(micros.unsigned_abs()),
                Call::Wait(micros) => now += Duration::from_micros(micros.unsigned_abs()),
                Call::Rtt(micros) => rtt = Duration::from_micros(micros),
            }
            assert!(flow.window_bytes.is_finite() && flow.rate().is_finite());
            assert!(flow.window() >= 4 * 1200, "{}", flow.window());
            let full = flow.delivery.in_flight_bytes() >= flow.window();
            let most = if full { flow.window() } else { 9 * flow.window() };
            assert!((flow.window()..=most).contains(&flow.paced_window()));
            assert!(ceiling.lower(flow.window()) >= 3 * 1200);
            assert!(ceiling.lower(flow.window()) <= flow.window());
        }
    }
}
