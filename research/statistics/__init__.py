"""Was it real? What `research.compare` computes of arms of runs, in words and numbers.

arms         the data model: trained runs by arm, their pairs by seed, what sets the arms apart
"""
