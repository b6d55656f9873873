"""What ends a training early, and what is made of it.

stopping     Ctrl-C, SIGTERM, SLURM: save first, then stop
loop_counts  what Lightning miscounts when it goes on
nonfinite    the first loss that is no number ends the run, and its step is kept
diagnosis    a kept step done again, and where its first bad number came from
memory       out of memory, told as the batch size to try
"""
