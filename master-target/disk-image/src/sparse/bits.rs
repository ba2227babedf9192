//! A set of numbers that are mostly near each other.

/// Words of a page: 65,536 numbers in 8 KiB.
const PAGE_WORDS: usize = 1024;
const PAGE_NUMBERS: u64 = PAGE_WORDS as u64 * 64;

/// A bit for every number below a bound. Memory is taken only for pages that have one: 4 MiB where all
/// grains of 64 KiB in a file of 2 TiB are named, 64 MiB at most.
#[derive(Debug, Default)]
pub(crate) struct Bits {
    pages: Vec<Option<Box<[u64; PAGE_WORDS]>>>,
    any: bool,
}

impl Bits {
    /// None of the numbers below `bound`; nothing else is ever in it.
    pub(crate) fn below(bound: u64) -> Self {
        let pages = bound.div_ceil(PAGE_NUMBERS) as usize;
        Self { pages: (0..pages).map(|_| None).collect(), any: false }
    }

    pub(crate) fn has(&self, number: u64) -> bool {
        let (page, word, bit) = place(number);
        matches!(self.pages.get(page), Some(Some(words)) if words[word] & bit != 0)
    }

    /// Puts a number in; says whether it was in it before.
    pub(crate) fn put(&mut self, number: u64) -> bool {
        let (page, word, bit) = place(number);
        let Some(page) = self.pages.get_mut(page) else { return false };
        let words = page.get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
        let before = words[word] & bit != 0;
        words[word] |= bit;
        self.any = true;
        before
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.any
    }

    /// Whether all of it is in one of the `others`.
    pub(crate) fn is_within(&self, others: [&Self; 2]) -> bool {
        self.pages.iter().enumerate().all(|(index, page)| {
            let Some(words) = page else { return true };
            let others = others.map(|other| other.pages.get(index).and_then(Option::as_ref));
            words.iter().enumerate().all(|(at, word)| {
                let covered = others.iter().flatten().fold(0, |all, other| all | other[at]);
                word & !covered == 0
            })
        })
    }
}

fn place(number: u64) -> (usize, usize, u64) {
    let within = number % PAGE_NUMBERS;
    ((number / PAGE_NUMBERS) as usize, (within / 64) as usize, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_in_it_once_they_are_put_and_never_beyond_the_bound() {
        let mut bits = Bits::below(70_000);
        for number in [0, 63, 64, 65_535, 65_536, 69_999] {
            assert!(!bits.has(number) && !bits.put(number), "{number}");
            assert!(bits.has(number) && bits.put(number), "{number}");
        }
        assert!(!bits.has(1) && !bits.put(1 << 40) && !bits.has(1 << 40));
    }

    #[test]
    fn a_set_is_within_two_others_if_each_number_is_in_one() {
        let [mut all, mut low, mut high] = [0; 3].map(|_| Bits::below(200_000));
        for number in [5, 150_000] {
            all.put(number);
        }
        low.put(5);
        assert!(!all.is_within([&low, &high]) && low.is_within([&all, &high]));
        high.put(150_000);
        assert!(all.is_within([&low, &high]));
    }
}
