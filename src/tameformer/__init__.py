"""Train Transformers that do not fall over."""

__version__ = "0.1.0"
