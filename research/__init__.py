"""Which loss, which optimizer, which learning rate?  A research template for CIFAR-10.

fit            python -m research.fit: train, validate, test, record
evaluate       python -m research.evaluate: score a recorded run again, on these pictures or others
predict        python -m research.predict: label pictures with a recorded run
compare        python -m research.compare: which of several ways is better, and how sure that is
comparison     from what was named to arms, a verdict and a report
repetition     several seeds, or arms on the same seeds, under one parent run
statistics     what a comparison computes and draws
randomness     weights, order, augmentation and dropout, each by a seed of its own
repair         python -m research.repair: deliver what waits, end dead runs, follow a moved folder
replay         python -m research.replay: look at the step whose loss was NaN or infinite
command        exit codes and words for what goes wrong, the same for all commands
training       fit as a plain function
resumption     from --resume RUN to the settings and the checkpoint that it goes on with
faults         what ends a training early, and what is made of it: signals, NaN, memory
building       from a configuration to data, network, classifier and trainer
configuration  files and flags: merged, checked against signatures, explained
speed          what makes a step and a start short, without changing what is trained
together       many small trainings at once: fit for each, one stack of networks for all
classifier     the LightningModule: network + loss + optimizer + figures, nothing else
evaluation     how good the answers on the test split are, whatever the loss
checkpoints    what is kept of a training, and how it is used again
processes      one run on several: who they are, what they share, how they end
scaling        learning rates with the number of processes: only where asked for
recording      what a run leaves in MLflow beside its curves, and the hash that finds its equals
pictures       how its pictures are drawn
callbacks      the pace of an epoch, progress, checkpoints
dynamics       gradient norm and update-to-weight ratio
networks       plain nn.Modules; the tutorial's CNN first
airbench       Jordan's recipe for 94 %: its network, its whitening, its optimizer
checks         what a network refuses, and in which words
losses         every torch loss as a classification loss: (scores, labels) -> loss
optimizers     what torch.optim lacks for us, and the learning-rate schedules
data           the LightningDataModules, and the batches they hand out
tracking       where runs live, and the process that records them
"""
