//! Values of several rounds.

/// Values of one thing, a round each; at least one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rounds(Vec<f64>);

impl Rounds {
    /// # Panics
    /// Where there is none, or one is no number.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Rounds {
        let mut values: Vec<f64> = values.into_iter().collect();
        assert!(!values.is_empty() && values.iter().all(|value| !value.is_nan()), "{values:?}");
        values.sort_by(f64::total_cmp);
        Rounds(values)
    }

    /// The middle one, or halfway between the two in the middle.
    pub(crate) fn median(&self) -> f64 {
        let (low, high) = ((self.0.len() - 1) / 2, self.0.len() / 2);
        f64::midpoint(self.0[low], self.0[high])
    }

    pub(crate) fn min(&self) -> f64 {
        self.0[0]
    }

    pub(crate) fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let rounds = Rounds::of([3.0, 1.0, 10.0]);
        assert_eq!((rounds.median(), rounds.min(), rounds.max()), (3.0, 1.0, 10.0));
        assert_eq!(Rounds::of([4.0, 1.0, 2.0, 3.0]).median(), 2.5);
    }
}
