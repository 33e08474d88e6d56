"""Faults: the cases that a run must survive, the table of what became of them, and the soak."""
