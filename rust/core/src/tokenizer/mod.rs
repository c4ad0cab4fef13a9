//! Byte-level BPE: text to ids and back.
