"""Seeded damage to everything that comes from outside, in child processes: ``python -m tests.fuzz --minutes 60``."""
