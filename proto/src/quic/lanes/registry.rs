//! Where lanes find their link, at a target.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use quinn::RecvStream;
use tokio::sync::mpsc;

use crate::id::PeerName;
use crate::link::Places;
use crate::quic::lanes::{CONNECTIONS_MAX, Lane, Lanes, TAKEN, TICKET_BYTES, Ticket, ticket};
use crate::quic::load::Load;

/// How long a lane may take to show its ticket.
const TICKET_TIME_MAX: Duration = Duration::from_secs(5);

/// Batches of all lanes that wait to be accepted; more wait in the transport.
const WAITING_MAX: usize = 1;

/// Lanes of one agent that have not shown their ticket yet; it opens one at a time. More are closed, so
/// that one agent's certificate cannot take the target's memory.
const STRAYS_MAX: usize = 2;

/// Lanes of one agent: those of its session, and of one that is about to replace it. More are closed, for
/// the same reason.
const LANES_MAX: usize = 2 * (CONNECTIONS_MAX - 1);

/// The links of a listener that may have lanes.
#[derive(Debug)]
pub(in crate::quic) struct Registry {
    links: Mutex<HashMap<Ticket, Link>>,
    /// Lanes that have not shown their ticket yet.
    strays: Arc<Places>,
    /// Lanes that have.
    joined: Arc<Places>,
}

impl Default for Registry {
    fn default() -> Self {
        let [strays, joined] = [STRAYS_MAX, LANES_MAX].map(|most| Arc::new(Places::new(most)));
        Self { links: Mutex::default(), strays, joined }
    }
}

#[derive(Debug)]
struct Link {
    peer: PeerName,
    lanes: Weak<Lanes>,
    batches: mpsc::Sender<RecvStream>,
}

impl Registry {
    /// Lets lanes join the link of `lanes`, whose first connection is `first`; returns what they bring.
    pub(in crate::quic) fn open(
        &self,
        first: &quinn::Connection,
        peer: &PeerName,
        lanes: &Arc<Lanes>,
    ) -> mpsc::Receiver<RecvStream> {
        let (batches, waiting) = mpsc::channel(WAITING_MAX);
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|_, link| link.lanes.strong_count() > 0);
        if let Some(ticket) = ticket(first) {
            let (peer, lanes) = (peer.clone(), Arc::downgrade(lanes));
            links.insert(ticket, Link { peer, lanes, batches });
        }
        waiting
    }

    #[cfg(test)]
    pub(in crate::quic) fn forget(&self) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Adds `lane`, which came from `peer`, to the link whose ticket it shows.
    ///
    /// # Errors
    /// It shows none, or none of a link of this peer, or the link, or the agent, has as many as it may.
    pub(in crate::quic) async fn join(
        &self,
        lane: quinn::Connection,
        peer: &PeerName,
        load: Arc<Load>,
    ) -> Result<(), &'static str> {
        let Some(stray) = self.strays.take(peer) else {
            return Err("an agent opens too many lanes at a time");
        };
        let shown = async {
            let (answer, mut showing) = lane.accept_bi().await.ok()?;
            let mut ticket = [0; TICKET_BYTES];
            showing.read_exact(&mut ticket).await.ok()?;
            Some((ticket, answer))
        };
        let Ok(Some((ticket, mut answer))) = tokio::time::timeout(TICKET_TIME_MAX, shown).await
        else {
            return Err("a lane showed no ticket");
        };
        drop(stray);
        let (lanes, batches) = {
            let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            let link = links.get(&ticket).filter(|link| link.peer == *peer);
            let found = link.and_then(|link| Some((link.lanes.upgrade()?, link.batches.clone())));
            found.ok_or("a lane showed the ticket of no link of its agent")?
        };
        let Some(place) = self.joined.take(peer) else {
            return Err("an agent has too many lanes");
        };
        if !lanes.add(Lane::new(lane.clone(), load)) {
            return Err("a link has as many connections as it may");
        }
        let lanes = Arc::downgrade(&lanes);
        tokio::spawn(async move {
            let _place = place;
            let _ = answer.write_all(&[TAKEN]).await;
            // An agent that did not wait for the answer closes it, and loses nothing by that.
            let mut next = lane.accept_uni().await;
            if let Some(lanes) = lanes.upgrade() {
                match &next {
                    Ok(_) => lanes.bind(lane.clone()),
                    Err(_) => lanes.remove(&lane),
                }
            }
            while let Ok(stream) = next {
                if batches.send(stream).await.is_err() {
                    return;
                }
                next = lane.accept_uni().await;
            }
        });
        Ok(())
    }
}
