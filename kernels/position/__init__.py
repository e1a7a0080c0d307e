"""Rotary position embeddings: the table, the rotation, and the rotation after a norm of queries and keys."""
