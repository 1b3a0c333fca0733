"""Tunewright: an open, self-hosted fine-tuning platform."""

__version__ = "0.1.0"
