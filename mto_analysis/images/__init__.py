"""Images: where they come from, batches for measuring, and augmented batches with masks for training."""

from mto_analysis.images.augmentation import CONMIM_TEACHER, Augmentation, Photometric
from mto_analysis.images.batches import BrokenImage, ImageBatch, image_batches, preprocessing
from mto_analysis.images.interface import Images, choose_images
from mto_analysis.images.sources import open_images
from mto_analysis.images.training import EpochData, TrainBatch, TrainingData, steps_in_epoch

__all__ = [
    "CONMIM_TEACHER",
    "Augmentation",
    "BrokenImage",
    "EpochData",
    "ImageBatch",
    "Images",
    "Photometric",
    "TrainBatch",
    "TrainingData",
    "choose_images",
    "image_batches",
    "open_images",
    "preprocessing",
    "steps_in_epoch",
]
