//! The connection to the target: made, remade, and pumped into the owner loop.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backhaul_proto::identity::Identity;
use backhaul_proto::link::{ConnectOptions, Connection, StreamError, Transport, connect};
use backhaul_proto::message::{
    AgentMessage, HashReply, HashRequest, Hello, TargetMessage, Welcome, agent_message,
    target_message,
};
use backhaul_proto::quic::{Congestion, Connections, RateLimit, TransportOptions};
use backhaul_proto::session::{Backoff, Due, Weight};
use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::config::Config;

/// How long the target may take to answer a hello.
const WELCOME_TIME_MAX: Duration = Duration::from_secs(20);

/// TCP within a LAN that turned out unfit is not tried again for so long.
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
/// its senders: one progress message a machine and second, one reply a job, light batches of 64 KiB a machine,
/// and the questions that a sync keeps open; and it is dropped with the connection.
#[derive(Debug, Clone)]
pub struct LinkUp {
    /// The connection.
    pub connection: Connection,
    control: mpsc::UnboundedSender<AgentMessage>,
    sync: mpsc::UnboundedSender<HashRequest>,
    threads: Handle,
}

impl LinkUp {
    /// Sends a batch on the link's own threads: over TCP that encrypts. Heavy ones leave in the order of the calls.
    pub fn batch(&self, chunks: Vec<Bytes>, due: Due, weight: Weight) {
        let sending = self.connection.release_batch(chunks, due, weight);
        // When it fails the connection has failed, and the batch is sent again on the next one.
        self.threads.spawn(async { drop(sending.await) });
    }

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
    // Who asked for another controller, or for several connections, asked for QUIC.
    let wants_several = matches!(config.connections, Connections::Exactly(2..));
    let lan_over_tcp = config.congestion == Congestion::Auto && !wants_several;
    let mut options = ConnectOptions {
        choice: config.transport,
        expected: config.target_name.clone(),
        transport: TransportOptions { rate_limit: ceiling.clone(), ..config.transport_options() },
        lan_over_tcp,
        udp_silent: false,
    };
    let mut doubted: Option<Instant> = None;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64);
    let mut backoff = Backoff::new(seed ^ u64::from(std::process::id()));
    let identity = Arc::new(identity);
    loop {
        let doubtful = doubted.is_some_and(|since| since.elapsed() < LAN_DOUBT);
        options.lan_over_tcp = lan_over_tcp && !doubtful && ceiling.get().is_none();
        let (began, mut tried) = (Instant::now(), Duration::ZERO);
        let reason = match connect(&config.target, &identity, &options).await {
            Err(error) => {
                tried = began.elapsed();
                error.to_string()
            }
            Ok(connection) => {
                let over_tcp = connection.transport() == Transport::Tcp;
                options.udp_silent = over_tcp && !connection.is_within_lan();
                tokio::select! {
                    reason = converse(&connection, &events, &mut backoff) => reason,
                    reason = connection.unfit() => {
                        doubted = Some(Instant::now());
                        connection_reason(&connection, &reason).await
                    }
                }
            }
        };
        if events.send(LinkEvent::Down(reason)).is_err() {
            return;
        }
        // Nothing tells when the target is back, and one that is down would be knocked at without pause.
        // An attempt that nobody answered was such a pause: a link may be back since its last packet.
        tokio::time::sleep(backoff.handle_failure().saturating_sub(tried)).await;
    }
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
    let threads = Handle::current();
    let link = LinkUp { connection: connection.clone(), control, sync, threads };
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
        () = connection.look_after() => Ok(()),
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
