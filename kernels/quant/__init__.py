"""Quantizing a step's values and a checkpoint's weights, and dequantizing those that no kernel reads as stored."""
