"""Checkpoints: `loading` reads a folder of any format into a model, `saving` writes one, `convert` makes one out of a
TensorFlow 1 checkpoint of ConvBERT's original code.

`weight_files` knows which files of a folder hold the weights; `stored_tensors` (safetensors), `pickled_tensors`
(pytorch_model.bin) and `keras_tensors` (tf_model.h5) open them.
"""

from fastconv.checkpoints.loading import CheckpointWarning, load_folder
from fastconv.checkpoints.saving import save_folder
from fastconv.checkpoints.stored_tensors import listed
from fastconv.checkpoints.weight_files import FILES

__all__ = ["FILES", "CheckpointWarning", "listed", "load_folder", "save_folder"]
