"""Checkpoints of every published format, quantized ones included, and where they come from."""
