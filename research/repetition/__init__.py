"""The same experiment on several seeds, or several arms on the same seeds, under one parent run.

seeds      which seeds --seeds asks for
trainings  which trainings there are, as pinned slots of one study
repeating  from start to end: workers, the parent run, going on with what is missing
summary    mean, standard deviation and interval; as a table, and as metrics of the parent
"""
