"""Pretraining of Mamba-1 language models. Importing this package loads nothing heavy; import the room you need."""

__version__ = "0.1.0"
