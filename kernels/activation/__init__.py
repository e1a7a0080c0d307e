"""Gated activations of an MLP: SwiGLU, GeGLU and gpt-oss's, plain or with their result quantized."""
