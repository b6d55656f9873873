"""Settings: `compose` merges files and flags, `schema` checks them, `help` tells what there is.

`research.configuration.compose` imports no torch, so that what can be told at once is.
"""
