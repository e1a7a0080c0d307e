"""Attention and what it reads: the paged KV cache's writes, latent attention (MLA), and merging of parts."""
