"""Labelled images out of a file: an `.npz` of arrays, or a zip of class folders."""

from services.datasets.parsing import ParsedImages, parse_images
from services.datasets.splits import SPLITS, SplitImages

__all__ = ["SPLITS", "ParsedImages", "SplitImages", "parse_images"]
