"""Searches on Optuna: the space, the storage, the trials, and what came of them."""
