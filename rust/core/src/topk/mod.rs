//! Selection of the k highest scores of each row.
