"""The data sets, all handed out the same way: whole in memory, batch by batch as tensors.

module         what all data sets share: the split, the batches, the settings
cifar10        CIFAR-10 as published
image_folder   any folder of pictures, one sub-folder for each class
synthetic      shapes and textures drawn on the spot
gallery        class folders that are only scored
batches        what a model is fed with: shuffled, altered, normalised
augmentation   random crop, flip, cutout
normalization  bytes to floats
split          pictures and labels, parted into train, validation and test
decoding       picture files to bytes
shared         one copy in memory for all processes of a run on a machine
kept           pictures that stay in memory from one training to the next
streams        one random stream per purpose
"""

from research.data.cifar10 import CIFAR10
from research.data.image_folder import ImageFolder
from research.data.module import DataError, ImageData
from research.data.synthetic import Synthetic

__all__ = ["CIFAR10", "DataError", "ImageData", "ImageFolder", "Synthetic"]
