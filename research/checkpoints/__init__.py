"""What is kept of a training, and how it is used again.

io       written so that a kill leaves a whole one; torn ones recognised
content  where one came from, and the random states of all processes
trained  from a recorded run to its trained network
"""
