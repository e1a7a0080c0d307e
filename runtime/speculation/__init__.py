"""Guess the next tokens cheaply, so that one step of the model can confirm several."""
