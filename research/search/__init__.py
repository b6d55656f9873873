"""Searches on Optuna: what is searched through, by whom, and what came of it."""
