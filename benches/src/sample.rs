//! Figures of several runs.

use std::fmt;

/// The figures of one contender.
#[derive(Debug, Clone, Default)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Adds the figure of a run.
    pub fn push(&mut self, figure: f64) {
        self.0.push(figure);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle figure; the lower of two. 0 without any.
    pub fn median(&self) -> f64 {
        self.0.get(self.0.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.0.first().unwrap_or(&0.0), self.0.last().unwrap_or(&0.0));
        let digits = f.precision().unwrap_or(2);
        write!(f, "{:.digits$} ({low:.digits$}–{high:.digits$})", self.median())
    }
}

#[cfg(test)]
mod tests {
    use super::Sample;

    #[test]
    fn the_median_of_three_is_the_middle_one() {
        let mut sample = Sample::default();
        for figure in [3.0, 1.0, 2.0] {
            sample.push(figure);
        }
        assert_eq!(sample.to_string(), "2.00 (1.00–3.00)");
    }
}
