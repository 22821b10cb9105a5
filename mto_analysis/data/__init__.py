"""Pictures: where they come from, batches for measuring, and augmented batches with masks for training."""

from mto_analysis.data.augmentation import CONMIM_TEACHER, Augmentation, Photometric
from mto_analysis.data.batches import BrokenPicture, PictureBatch, picture_batches, preprocessing
from mto_analysis.data.sources import Pictures, choose_pictures, open_pictures
from mto_analysis.data.training import TrainBatch, TrainingData

__all__ = [
    "CONMIM_TEACHER",
    "Augmentation",
    "BrokenPicture",
    "Photometric",
    "PictureBatch",
    "Pictures",
    "TrainBatch",
    "TrainingData",
    "choose_pictures",
    "open_pictures",
    "picture_batches",
    "preprocessing",
]
