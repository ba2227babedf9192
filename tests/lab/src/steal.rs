//! What a hypervisor takes of this machine's processors.

use std::fs;

/// A share above which a measurement says more of the host than of what was measured.
pub const SHARE_MAX: f64 = 0.05;

/// Processor time, counted from a moment on (proc_stat(5)). On a machine that shows none nothing was taken.
#[derive(Debug, Clone, Copy)]
pub struct Stolen {
    stolen: u64,
    all: u64,
}

impl Stolen {
    /// From now on.
    pub fn from_now() -> Self {
        let [stolen, all] = read(&fs::read_to_string("/proc/stat").unwrap_or_default());
        Self { stolen, all }
    }

    /// What share of all processors' time was taken away since then, 0 to 1.
    pub fn share(&self) -> f64 {
        let now = Self::from_now();
        let all = now.all.saturating_sub(self.all).max(1);
        now.stolen.saturating_sub(self.stolen) as f64 / all as f64
    }
}

/// Stolen and all ticks of the first line: user, nice, system, idle, iowait, irq, softirq, steal; what follows is
/// a part of the first two.
fn read(stat: &str) -> [u64; 2] {
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> =
        line.split_whitespace().skip(1).take(8).flat_map(str::parse::<u64>).collect();
    [ticks.get(7).copied().unwrap_or(0), ticks.iter().sum()]
}

#[cfg(test)]
mod tests {
    use super::{Stolen, read};

    #[test]
    fn what_was_taken_is_the_eighth_number() {
        let stat = "cpu  10 1 20 60 3 0 1 5 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(read(stat), [5, 100]);
        assert_eq!(read("nothing"), [0, 0]);
        assert!((0.0..=1.0).contains(&Stolen::from_now().share()));
    }
}
