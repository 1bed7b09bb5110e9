"""Models that compute something else than their sites say, and what becomes of it: `python -m tests.attacks` lists every attack."""
