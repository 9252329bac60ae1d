"""How long tests wait for other processes."""

PATIENCE = 1800
"""Seconds. It ends a hang and nothing else: beside others a process may get a tenth of a CPU."""
