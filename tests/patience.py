"""How long tests wait for other processes."""

PATIENCE = 3600
"""Seconds. It ends a hang and nothing else: beside others a test may get a tenth of a CPU."""
