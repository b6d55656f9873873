"""Was it real? What `research.compare` computes of arms of runs, in words and numbers.

Nothing here knows where runs are kept or how they are trained.

The arms
    arms        the data model: trained runs by arm, their pairs by seed, what sets the arms apart
Two arms and several
    mean        the mean of few numbers, its interval and test; how often it holds the truth
    interval    both ends of an interval, and its level
    difference  how far two arms are apart: all that is known of it, in one place
    paired      the difference of two arms that shared their seeds
    unpaired    the same where the seeds do not match
    several     Holm's correction over several arms; the ranking
    pairs       how many pairs it would take; the smallest difference that n pairs show
    verdict     which arm is better and by how much, in words, and what to read with care
One experiment
    noise       its variance, split by source: weights, order, augmentation, dropout, hardware
    readable    the smallest difference worth reading in that noise
A search
    best_of     the best of k trials that it may expect
    basin       the learning-rate fan of a cell, and the width of its basin of good rates
    survival    how long it takes to a target, with runs that never reach it
    cross_loss  networks trained with each loss, scored under every loss
What is made of it
    figures     as pictures
    report      as one HTML file, as Markdown and as LaTeX
"""
