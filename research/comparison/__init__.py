"""What `python -m research.compare` does between the store and the statistics.

gathering  what was typed becomes arms: runs, parents, searches
grouping   runs that were trained alike are one arm, and what it is called
selection  the arms of a search: its confirmed configurations, or the best of each cell
training   arms out of files, the best of a search again, the noise of one experiment
judging    whether arms can be compared, by which metric, and the verdicts
cautions   what speaks against reading a difference
screen     all that as text
account    all that as a report
searching  what a search adds to a report;  racing: times to a target
noise      where the noise of one experiment comes from, as text and as a report
"""
