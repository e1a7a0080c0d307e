"""Who holds which blocks of the KV cache."""
