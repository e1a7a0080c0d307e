"""The ways in: `LLM`, the command line, and what a terminal shows."""
