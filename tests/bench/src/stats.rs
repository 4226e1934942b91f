//! What is said of a row of samples: the middle, the tail, the range. Pure functions.

/// From how many samples on a 99th percentile says anything.
pub(crate) const ENOUGH_FOR_P99: usize = 100;

/// What is said of the samples of one measure of one engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) count: usize,
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
    /// The value that 99 % are not above, where there are enough samples.
    pub(crate) p99: Option<f64>,
}

/// The summary of samples; nothing of none.
pub(crate) fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (least, most) = (*sorted.first()?, *sorted.last()?);
    let count = sorted.len();
    let median = if count % 2 == 1 {
        sorted[count / 2]
    } else {
        f64::midpoint(sorted[count / 2 - 1], sorted[count / 2])
    };
    // The nearest rank: a value that was measured, none between two.
    let p99 = (count >= ENOUGH_FOR_P99).then(|| sorted[(count * 99).div_ceil(100) - 1]);
    Some(Summary { count, median, least, most, p99 })
}

/// The least and the greatest ratio among rounds, each a pair that was measured one after the other.
pub(crate) fn ratio_range(pairs: &[(f64, f64)]) -> Option<(f64, f64)> {
    let ratios: Vec<f64> = pairs.iter().filter(|pair| pair.1 > 0.0).map(|pair| pair.0 / pair.1).collect();
    summary(&ratios).map(|summary| (summary.least, summary.most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(summary(&[3.0, 1.0, 2.0]).map(|summary| summary.median), Some(2.0));
        assert_eq!(summary(&[4.0, 1.0, 2.0, 3.0]).map(|summary| summary.median), Some(2.5));
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn a_tail_is_told_of_a_hundred_samples_and_is_one_of_them() {
        let samples: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(summary(&samples).and_then(|summary| summary.p99), Some(198.0));
        assert_eq!(summary(&samples[..100]).and_then(|summary| summary.p99), Some(99.0));
        assert_eq!(summary(&samples[..99]).and_then(|summary| summary.p99), None);
    }

    #[test]
    fn the_range_of_ratios_is_that_of_the_pairs() {
        assert_eq!(ratio_range(&[(1.0, 2.0), (3.0, 4.0), (1.0, 0.0)]), Some((0.5, 0.75)));
        assert_eq!(ratio_range(&[]), None);
    }
}
