"""Training runs that are killed at random and started again, until they have finished or the time is up.

`python -m ops.soak` is the soak; `tests/faults/test_random_kills.py` uses its sessions and checks.
"""
