//! The one place where errors of the core become Python exceptions.
