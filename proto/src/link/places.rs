//! How much one identity may have open at a time, so that one agent's certificate cannot take the target's
//! memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::id::PeerName;

/// How many of something each identity has, up to a bound.
#[derive(Debug)]
pub struct Places {
    most: usize,
    held: Mutex<HashMap<PeerName, usize>>,
}

impl Places {
    /// Each identity may have `most`.
    pub fn new(most: usize) -> Self {
        Self { most, held: Mutex::default() }
    }

    /// A place for one of `peer`'s, given back when it is dropped; or none is left.
    pub fn take(self: &Arc<Self>, peer: &PeerName) -> Option<Place> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(peer.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Place { places: Arc::clone(self), peer: peer.clone() })
    }
}

/// One place among those of its identity.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    peer: PeerName,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.places.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::Places;

    #[test]
    fn an_identity_has_so_many_places_and_others_keep_theirs() {
        let places = Arc::new(Places::new(8));
        let (one, other) = ("one".parse().unwrap(), "other".parse().unwrap());
        let mut held: Vec<_> = (0..8).map(|_| places.take(&one)).collect();
        assert!(held.iter().all(Option::is_some));
        assert!(places.take(&one).is_none());
        assert!(places.take(&other).is_some());
        held.pop();
        assert!(places.take(&one).is_some());
        drop(held);
        assert!(places.held.lock().unwrap().is_empty(), "nothing is kept of those that are gone");
    }
}
