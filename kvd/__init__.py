"""kvd: keeps the KV cache of unmodified SGLang workers and gives it back."""

__version__ = "0.1.0"
