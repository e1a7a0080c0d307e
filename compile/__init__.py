"""Capture, pipeline, pieces, record, pack: from a plain module to an inspectable, replayable program."""
