//! The tokenizer as a whole, on a small vocabulary. Real files are compared with their reference from Python.
