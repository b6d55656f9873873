"""What `python -m research.compare` does between the store and the statistics.

asked       what was typed
conducting  a comparison from start to end

Arms
gathering   what was named becomes arms: runs, parents, searches
grouping    runs that were trained alike are one arm, and what it is called
selection   the arms of a search: its confirmed configurations, or the best of each cell
training    arms out of files, a recorded run again, the noise of one experiment
confirming  the best of a search, trained again but for what was confirmed before

What is said of them
judging     whether arms can be compared, by which metric, and the verdicts
cautions    what speaks against reading a difference
noise       where the noise of one experiment comes from
searching   what a search adds to a report;  racing: times to a target
screen      all that as text;  account: as a report;  publishing: where that goes
"""
