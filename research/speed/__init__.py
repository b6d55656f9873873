"""What makes a step and a start short, without changing what is trained.

allocation  freed memory stays with the process
spared      what Lightning would import, and nobody here asks for
precision   bfloat16 where the device computes in it
epoch_loop  Lightning's loop over the batches, without what it puts around every hook
capture     a training step as one CUDA graph
"""
