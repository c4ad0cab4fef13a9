"""The built-in model: a small trained DSA language model that ships with the package.

It lies beside this file as a Hugging Face checkpoint, so whatever reads one reads it. docs/builtin-model.md says how
it was made and what it can do.
"""

from pathlib import Path


def path() -> Path:
    """Directory of the built-in checkpoint.

    Example:
        >>> (path() / "config.json").exists()
        True
    """
    return Path(__file__).parent
