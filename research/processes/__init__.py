"""One run on several processes, a device each: who they are, what they share, how they end.

launch      who started this process, and which of how many it is
placement   Lightning's devices and nodes as what was started has them
jobs        what SLURM or torchrun starts again goes on with the run that it was
restarts    a restart meets its own processes, not the addresses of those that died
shares      the scores and labels of a batch, brought together for one loss
sharding    fsdp: weights parted among the processes
lifeline    a line to the first process, by which all learn at once that one died
deaths      what happens then: the record says why, and all of them end
"""
