//! What an error says, once.

use std::error::Error;

/// The error with its causes, each after a colon, but none that the text before it has already:
/// many errors of libraries end with their cause, and then name it as one, too.
pub fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text += ": ";
            text += &more;
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror::Error;

    use super::sentence;

    #[derive(Debug, Error)]
    #[error("socket cannot be made: {source}")]
    struct WithCause {
        source: io::Error,
    }

    #[derive(Debug, Error)]
    #[error("the daemon cannot start")]
    struct Outer(#[source] WithCause);

    /// "address cannot be listened on: Address already in use: Address already in use".
    #[test]
    fn a_cause_is_said_once() {
        let error = Outer(WithCause { source: io::Error::other("in use") });
        assert_eq!(sentence(&error), "the daemon cannot start: socket cannot be made: in use");
    }
}
