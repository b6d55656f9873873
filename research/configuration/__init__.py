"""Settings: `compose` lays files and flags over one another, `schema` checks them, `help` tells them.

`research.configuration.compose` imports no torch, so that what can be told at once is.
"""
