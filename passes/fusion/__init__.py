"""Passes that join neighbouring ops into one contract."""
