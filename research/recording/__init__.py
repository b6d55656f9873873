"""What a run leaves behind.

identity  what a run is before it begins, and the hash that finds its equals
record    what it leaves in MLflow beside its curves
album     its pictures: which are drawn when
export    the network as a program that needs none of this code
"""
