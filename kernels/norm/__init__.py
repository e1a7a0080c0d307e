"""Norms over a row: RMSNorm and LayerNorm, alone, after a residual sum, and with their result quantized."""
