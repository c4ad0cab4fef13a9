"""Model definitions that `heedful.LLM` serves."""

from heedful.models.dsa import DSAForCausalLM
from heedful.models.loading import load_model

__all__ = ["DSAForCausalLM", "load_model"]
