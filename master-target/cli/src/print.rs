//! Printing.

/// Prints a line. A reader that went away (`| head`) is no reason to complain.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

pub(crate) use say;
