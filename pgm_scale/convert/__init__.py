"""Checkpoints of others, to exported folders and back: a table of keys for each format, and no foreign code run."""
