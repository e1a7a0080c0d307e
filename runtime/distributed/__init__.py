"""The groups of ranks that share a model."""
