"""Mamba-1: mixer, block, language model, and the laws its parameters obey. Start with `lm.py`."""
