//! The connection to the target: made, remade, and pumped into the owner loop.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backhaul_proto::identity::Identity;
use backhaul_proto::link::{
    ConnectOptions, Connection, LinkStats, StreamError, Transport, TransportChoice, connect,
};
use backhaul_proto::message::{
    AgentMessage, HashReply, HashRequest, Hello, TargetMessage, Welcome, agent_message,
    target_message,
};
use backhaul_proto::quic::{Congestion, RateLimit, TransportOptions};
use backhaul_proto::session::Backoff;
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;

/// How long the target may take to answer a hello.
const WELCOME_TIME_MAX: Duration = Duration::from_secs(20);

/// How often TCP's losses within a LAN are looked at.
const LAN_PERIOD: Duration = Duration::from_secs(5);

/// What TCP may send again of a period's segments. With more the path is not clean, and QUIC, which
/// random loss does not slow down, is the better one: at a round trip of 1 ms, TCP's own controllers
/// come to 300 Mbit/s at this loss.
const LAN_LOSS_MAX: f64 = 0.002;

/// Fewer segments than this say nothing.
const LAN_SEGMENTS_MIN: u64 = 1000;

/// For so long after that TCP is not tried again within this LAN.
const LAN_DOUBT: Duration = Duration::from_secs(3600);

/// What the link tells the owner loop.
#[derive(Debug)]
pub enum LinkEvent {
    /// A connection stands; what shall the hello say?
    Greeting(oneshot::Sender<Hello>),
    /// The target answered.
    Connected {
        /// For batches.
        link: LinkUp,
        /// What it answered.
        welcome: Welcome,
    },
    /// The target said something.
    Message(target_message::Kind),
    /// The target answered a question of a sync.
    Answer(HashReply),
    /// There is no connection, for this reason.
    Down(String),
}

/// A live connection, as the owner loop uses it. What is queued in the two channels is bounded by
/// its senders: one progress message a machine and second, one reply a job, and the questions that
/// a sync keeps open; and it is dropped with the connection.
#[derive(Debug, Clone)]
pub struct LinkUp {
    /// The connection.
    pub connection: Connection,
    control: mpsc::UnboundedSender<AgentMessage>,
    sync: mpsc::UnboundedSender<HashRequest>,
}

impl LinkUp {
    /// Sends a control message.
    pub fn control(&self, kind: agent_message::Kind) {
        // Fails only when the connection is gone, of which the owner loop hears in its own time.
        let _ = self.control.send(AgentMessage { kind: Some(kind) });
    }

    /// Asks for hashes.
    pub fn ask(&self, request: HashRequest) {
        let _ = self.sync.send(request);
    }
}

/// Keeps a connection to the target for as long as the process lives.
pub async fn run(
    config: Config,
    identity: Identity,
    ceiling: RateLimit,
    events: mpsc::UnboundedSender<LinkEvent>,
) {
    // Who asked for a ceiling or a controller asked for QUIC's.
    let lan_over_tcp = config.limit.is_empty() && config.congestion == Congestion::Auto;
    let mut options = ConnectOptions {
        choice: config.transport,
        expected: config.target_name.clone(),
        transport: TransportOptions {
            congestion: config.congestion,
            rate_limit: ceiling,
            ..TransportOptions::default()
        },
        lan_over_tcp,
    };
    let mut doubted: Option<Instant> = None;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64);
    let mut backoff = Backoff::new(seed ^ u64::from(std::process::id()));
    let identity = Arc::new(identity);
    loop {
        let doubtful = doubted.is_some_and(|since| since.elapsed() < LAN_DOUBT);
        options.lan_over_tcp = lan_over_tcp && !doubtful;
        let reason = match connect(&config.target, &identity, &options).await {
            Err(error) => error.to_string(),
            Ok(connection) => {
                // Where UDP does not pass this costs one attempt an hour.
                let chosen = options.lan_over_tcp && options.choice == TransportChoice::Auto;
                let watched = chosen && connection.transport() == Transport::Tcp;
                tokio::select! {
                    reason = converse(&connection, &events, &mut backoff) => reason,
                    lost = lossy(&connection), if watched => {
                        doubted = Some(Instant::now());
                        let reason = format!(
                            "TCP lost {:.1} % of its segments: QUIC is used instead", lost * 100.0
                        );
                        tracing::warn!("{reason}");
                        connection.close(&reason);
                        reason
                    }
                }
            }
        };
        if events.send(LinkEvent::Down(reason)).is_err() {
            return;
        }
        // A target that is down would be knocked at without pause.
        tokio::time::sleep(backoff.handle_failure()).await;
    }
}

/// Returns once too much of what is sent over TCP is lost, with the share that is.
async fn lossy(connection: &Connection) -> f64 {
    let mut before = connection.stats();
    loop {
        tokio::time::sleep(LAN_PERIOD).await;
        let now = connection.stats();
        if let Some(lost) = lost_share(&before, &now).filter(|lost| *lost > LAN_LOSS_MAX) {
            return lost;
        }
        before = now;
    }
}

/// What was lost of what was sent in between, unless it is too little to tell.
fn lost_share(before: &LinkStats, now: &LinkStats) -> Option<f64> {
    let sent = now.sent_packets.saturating_sub(before.sent_packets);
    let lost = now.lost_packets.saturating_sub(before.lost_packets);
    (sent >= LAN_SEGMENTS_MIN).then(|| lost as f64 / sent as f64)
}

/// Holds one connection until it ends; returns why it did.
async fn converse(
    connection: &Connection,
    events: &mpsc::UnboundedSender<LinkEvent>,
    backoff: &mut Backoff,
) -> String {
    let streams = async {
        let control = connection.open_control().await?;
        let sync = connection.open_sync().await?;
        Ok::<_, StreamError>((control, sync))
    };
    let ((mut control_out, mut control_in), (mut sync_out, mut sync_in)) = match streams.await {
        Ok(streams) => streams,
        Err(error) => return error.to_string(),
    };
    let (reply, hello) = oneshot::channel();
    if events.send(LinkEvent::Greeting(reply)).is_err() {
        return "the agent is stopping".into();
    }
    let Ok(hello) = hello.await else { return "the agent is stopping".into() };
    let hello = AgentMessage { kind: Some(agent_message::Kind::Hello(hello)) };
    if let Err(error) = control_out.send(&hello).await {
        return error.to_string();
    }
    let answer = tokio::time::timeout(WELCOME_TIME_MAX, control_in.recv::<TargetMessage>()).await;
    let welcome = match answer {
        Ok(Ok(Some(TargetMessage { kind: Some(target_message::Kind::Welcome(welcome)) }))) => {
            welcome
        }
        Ok(Ok(Some(TargetMessage { kind: Some(target_message::Kind::Refused(refusal)) }))) => {
            return format!("the target refused the session: {}", refusal.sentence);
        }
        Ok(Ok(_)) => return connection_reason(connection, "the target sent no welcome").await,
        Ok(Err(error)) => return connection_reason(connection, &error.to_string()).await,
        Err(_) => return "the target did not answer the hello".into(),
    };
    backoff.handle_success();

    let (control, mut control_queue) = mpsc::unbounded_channel::<AgentMessage>();
    let (sync, mut sync_queue) = mpsc::unbounded_channel::<HashRequest>();
    let link = LinkUp { connection: connection.clone(), control, sync };
    if events.send(LinkEvent::Connected { link, welcome }).is_err() {
        return "the agent is stopping".into();
    }
    let controls = async {
        while let Some(message) = control_queue.recv().await {
            control_out.send(&message).await?;
        }
        Ok::<_, StreamError>(())
    };
    let questions = async {
        while let Some(message) = sync_queue.recv().await {
            sync_out.send(&message).await?;
        }
        Ok::<_, StreamError>(())
    };
    let messages = async {
        while let Some(message) = control_in.recv::<TargetMessage>().await? {
            if let Some(kind) = message.kind {
                let _ = events.send(LinkEvent::Message(kind));
            }
        }
        Ok::<_, StreamError>(())
    };
    let answers = async {
        while let Some(reply) = sync_in.recv::<HashReply>().await? {
            let _ = events.send(LinkEvent::Answer(reply));
        }
        Ok::<_, StreamError>(())
    };
    let ended = tokio::select! {
        ended = controls => ended,
        ended = questions => ended,
        ended = messages => ended,
        ended = answers => ended,
        reason = connection.closed() => return reason,
        () = connection.knock_while_silent() => Ok(()),
    };
    let reason = match ended {
        Ok(()) => "the session ended".to_owned(),
        Err(error) => error.to_string(),
    };
    connection_reason(connection, &reason).await
}

/// Closes the connection; if it was closed before, that reason says more than `reason`.
async fn connection_reason(connection: &Connection, reason: &str) -> String {
    connection.close(reason);
    connection.closed().await
}

#[cfg(test)]
mod tests {
    use backhaul_proto::link::LinkStats;

    use super::{LAN_LOSS_MAX, lost_share};

    #[test]
    fn a_few_segments_say_nothing_of_a_path() {
        let stats = |sent_packets, lost_packets| LinkStats {
            sent_packets,
            lost_packets,
            ..LinkStats::default()
        };
        let before = stats(5_000, 100);
        assert_eq!(lost_share(&before, &stats(5_999, 500)), None);
        let clean = lost_share(&before, &stats(15_000, 110)).unwrap();
        assert!(clean < LAN_LOSS_MAX, "{clean}");
        let lossy = lost_share(&before, &stats(15_000, 200)).unwrap();
        assert!(lossy > LAN_LOSS_MAX, "{lossy}");
        // The kernel forgot the connection.
        assert_eq!(lost_share(&before, &LinkStats::default()), None);
    }
}
