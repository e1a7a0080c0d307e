"""From logits to tokens: penalties, truncation, the draw, and log probabilities."""
