//! The orthonormal Walsh-Hadamard transform: spreads outliers over a row before it is quantised, and leaves exact dot
//! products of two transformed rows unchanged. Sylvester order, in place, O(D log D).

use rayon::prelude::*;

use crate::argument::{Result, ensure, ensure_volume};
use crate::elements::{Elements, ElementsMut};

/// Rows given to a thread at once.
const ROWS: usize = 256;

/// Transforms each row of `x` [N, D] into `out`, D a power of two.
///
/// # Errors
/// D is not a power of two, or `out` has another size than `x`.
pub fn hadamard(x: Elements<'_>, dim: usize, mut out: ElementsMut<'_>) -> Result<()> {
    ensure(
        dim.is_power_of_two(),
        "x",
        || "a last dimension that is a power of two".into(),
        || dim.to_string(),
    )?;
    ensure_volume("out", &[x.len()], out.len())?;
    ensure(
        x.len().is_multiple_of(dim),
        "x",
        || format!("rows of {dim} values"),
        || format!("{} values", x.len()),
    )?;
    let rows = x.len() / dim;
    let tasks: Vec<_> = (0..rows)
        .step_by(ROWS)
        .map(|start| (start, out.take_front((start + ROWS).min(rows).saturating_sub(start) * dim)))
        .collect();
    tasks.into_par_iter().for_each(|(start, mut out)| {
        let mut row = vec![0.0; dim];
        for i in 0..out.len() / dim {
            x.widen((start + i) * dim, &mut row);
            transform(&mut row);
            out.narrow(i * dim, &row);
        }
    });
    Ok(())
}

fn transform(row: &mut [f32]) {
    let mut half = 1;
    while half < row.len() {
        for pair in row.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = (row.len() as f32).sqrt().recip();
    row.iter_mut().for_each(|x| *x *= scale);
}
