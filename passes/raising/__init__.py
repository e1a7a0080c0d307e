"""Passes that recognise an op written out by hand and name its contract."""
