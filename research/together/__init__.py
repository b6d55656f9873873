"""Many small trainings at once, each a run of its own.

training      fit for each, one stack of networks for all
stacking      networks of one shape as one, in plain torch
shared_epoch  an epoch of all of them
halves        as many of them at once as the memory has room for
turns         how their fits take turns
"""
