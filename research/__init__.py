"""Which loss, which optimizer, which learning rate?  A research template for CIFAR-10.

fit          python -m research.fit: train, validate, test, record
classifier   the LightningModule: network + loss + optimizer + metrics, nothing else
networks     plain nn.Modules; the tutorial's CNN first
losses       every torch loss as a classification loss: (logits, labels) -> loss
optimizers   what torch.optim lacks for us, and the learning-rate schedules
data         the LightningDataModules, and the batches they hand out
tracking     where runs live and how they get there
"""
