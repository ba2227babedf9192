//! Whose turn it is, in the order in which it was asked for.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Gives out turns. Tokio's locks serve whoever is polled first, and tasks are not polled in the order in which
/// they were spawned: of 32 batches every second one overtook sixteen others.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<Line>);

/// Those whose turn is not over. It has one entry a [`Turn`].
#[derive(Debug, Default)]
struct Line {
    given: u64,
    /// By number; it is the first one's turn.
    standing: VecDeque<(u64, Option<Waker>)>,
}

/// A turn: it comes when all that were taken before it are over, and is over when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    turns: Arc<Turns>,
    number: u64,
}

impl Turns {
    /// Takes the next turn, now.
    pub(crate) fn take(self: &Arc<Self>) -> Turn {
        let mut line = self.line();
        line.given += 1;
        let number = line.given;
        line.standing.push_back((number, None));
        drop(line);
        Turn { turns: Arc::clone(self), number }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// Waits until it comes. Cancel safe.
    pub(crate) async fn come(&self) {
        poll_fn(|context| {
            let mut line = self.turns.line();
            match line.find(self.number) {
                Some(index) if index > 0 => {
                    let waker = &mut line.standing[index].1;
                    let before = waker.replace(context.waker().clone());
                    // Never under the lock: what a waker lets go of may hold a turn.
                    drop(line);
                    drop(before);
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            }
        })
        .await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut line = self.turns.line();
        let Some(index) = line.find(self.number) else { return };
        let own_waker = line.standing.remove(index);
        let next = line.standing.front_mut().filter(|_| index == 0);
        let waker = next.and_then(|(_, waker)| waker.take());
        drop(line);
        drop(own_waker);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Line {
    fn find(&self, number: u64) -> Option<usize> {
        self.standing.binary_search_by_key(&number, |(number, _)| *number).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake, Waker};

    use super::{Turn, Turns};

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn has_come(turn: &Turn, context: &mut Context<'_>) -> bool {
        pin!(turn.come()).poll(context).is_ready()
    }

    #[test]
    fn turns_come_in_the_order_in_which_they_were_taken() {
        let turns = Arc::new(Turns::default());
        let (woken, context) = (Arc::new(Woken::default()), Waker::noop());
        let woken_waker = Waker::from(Arc::clone(&woken));
        let mut third_context = Context::from_waker(&woken_waker);
        let mut context = Context::from_waker(context);
        let [first, second, third] = std::array::from_fn(|_| turns.take());
        assert!(!has_come(&third, &mut third_context));
        assert!(!has_come(&second, &mut context));
        assert!(has_come(&first, &mut context));
        // One that is given up before it came lets nobody pass those before it.
        drop(second);
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        assert!(!has_come(&third, &mut third_context));
        drop(first);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert!(has_come(&third, &mut third_context));
        let fourth = turns.take();
        assert!(!has_come(&fourth, &mut context));
        drop(third);
        assert!(has_come(&fourth, &mut context));
        drop(fourth);
        assert!(turns.line().standing.is_empty());
    }
}
