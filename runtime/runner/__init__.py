"""The importable model runner: one step of a model on one rank."""
