"""Passes that store weights and the KV cache quantized, and let products read them so."""
