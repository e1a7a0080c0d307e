"""Passes that share a model out over ranks: placements, the collectives they need, and overlap."""
