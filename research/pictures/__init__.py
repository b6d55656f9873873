"""What a run looks like: pictures drawn from its history, its decisions and its network.

Nothing here knows where a run is recorded or who trains it: tensors and modules in, a file out.

curves      loss, accuracy, learning rate and gradients over the epochs
results     confusion matrix, most confident mistakes, calibration
batch       a training batch after augmentation
layers      feature maps of a few pictures, filters of the first convolution
graph       the network's layers and how they are joined, as a picture and as a table
trace       that graph, found by watching the network work
inspection  looking into a network without leaving a trace in it
sheet       pictures and captions, laid out pixel by pixel
style       one look for all: colours, type, names made fit to print
"""
