"""Model definitions that `heedful.LLM` serves."""

from heedful.models.dsa import DSAForCausalLM

__all__ = ["DSAForCausalLM"]
