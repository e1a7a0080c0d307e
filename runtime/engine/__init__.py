"""The loop: requests in, steps, outputs out."""
