"""Searches on Optuna: what is searched through, by whom, and what came of it.

The file
    document    a search as its file says it, checked as a whole
    parts       its settings, each and space, taken apart
    space       classes with ranges of their own, ranges, lists; what a trial draws
    checking    all of it held to the signatures of the classes that it names
    arms        settings that are trained as they stand: a search that searches nothing
    strategies  Optuna's samplers and pruners by name, a sampler for each slot
    changes     what differs from the search that a study was made for
The studies
    storage     Optuna's storages, opened so that many processes can start at once
    slots       the places of a study's budget: who fills which, and what if he dies
    studies     the studies of a search: made, found again, compared with the file
The trials
    job         what a worker is told
    worker      a warm process that trains one trial after another
    desk        between a study and a training
    trial       one training, what is told of it on the way, and what came of it
    alone       a trial on several devices, in a process of its own
The search as a whole
    coordinator from start to end
    workers     the worker processes of one machine
    watch       what they say, and when to give up
    halting     Ctrl-C and SIGTERM
    parent      the search's own run in MLflow
    display     what is seen on the terminal meanwhile
What came of it
    results     its trials, and what differs among them
    ranking     the configurations in order, and how sure that order is
    winner      the best one as an experiment; who is run again on fresh seeds
    report      a table, and a summary with figures
    figures     the figures as files: importances, learning_rates, relations; scales, their axes
"""
