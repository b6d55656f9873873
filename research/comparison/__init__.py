"""What `python -m research.compare` does between the store and the statistics.

gathering  what was typed becomes arms: runs, parents, searches
grouping   runs that were trained alike are one arm, and what it is called
selection  the arms of a search: its confirmed configurations, or the best of each cell
judging    whether arms can be compared, by which metric, what speaks against it, and the verdicts
screen     all that as text
account    all that as a report
"""
