//! Measurements that take turns, so that other load on the machine meets all alike.

use std::ops::{Div, Index, Sub};

/// Nanoseconds per packet, or a ratio of two such: the minimum of all rounds, and their median.
#[derive(Clone, Copy)]
pub struct Cost {
    pub least: f64,
    pub median: f64,
}

impl Cost {
    fn of(mut rounds: Vec<f64>) -> Cost {
        rounds.retain(|figure| figure.is_finite());
        rounds.sort_by(f64::total_cmp);
        let least = *rounds.first().expect("a round succeeded");
        Cost { least, median: rounds[rounds.len() / 2] }
    }
}

impl Sub for Cost {
    type Output = Cost;

    fn sub(self, other: Cost) -> Cost {
        Cost { least: self.least - other.least, median: self.median - other.median }
    }
}

impl Div for Cost {
    type Output = Cost;

    fn div(self, other: Cost) -> Cost {
        Cost { least: self.least / other.least, median: self.median / other.median }
    }
}

impl Div<f64> for Cost {
    type Output = Cost;

    fn div(self, divisor: f64) -> Cost {
        Cost { least: self.least / divisor, median: self.median / divisor }
    }
}

/// Measurements that take turns.
#[derive(Default)]
pub struct Turns<'a>(Vec<Box<dyn Fn() -> f64 + 'a>>);

/// Index of a measurement.
#[derive(Clone, Copy)]
pub struct Turn(usize);

impl<'a> Turns<'a> {
    /// Adds a measurement; a round that failed is infinite.
    pub fn add(&mut self, measure: impl Fn() -> f64 + 'a) -> Turn {
        self.0.push(Box::new(measure));
        Turn(self.0.len() - 1)
    }

    pub fn take(self, rounds: usize) -> Costs {
        let mut figures = vec![Vec::with_capacity(rounds); self.0.len()];
        for _ in 0..rounds {
            for (figures, measure) in figures.iter_mut().zip(&self.0) {
                figures.push(measure());
            }
        }
        Costs(figures.into_iter().map(Cost::of).collect())
    }
}

/// The cost of each measurement.
pub struct Costs(Vec<Cost>);

impl Index<Turn> for Costs {
    type Output = Cost;

    fn index(&self, turn: Turn) -> &Cost {
        &self.0[turn.0]
    }
}
