"""Labelled images from a file.

The file is an `.npz` of arrays, or a zip of class folders.
"""

from services.datasets.npz import SPLITS, SplitImages
from services.datasets.parsing import ParsedImages, parse_images

__all__ = ["SPLITS", "ParsedImages", "SplitImages", "parse_images"]
