"""What the client returns: small frozen values, with plain ids instead of resource names."""

from defuse.values.correction import Correction, RegionChange
from defuse.values.dataset import Dataset
from defuse.values.estimate import Estimate
from defuse.values.model import Model, Preprocessing, Release
from defuse.values.region import Annotation, Images, Region, RegionPictures
from defuse.values.run import Run, SearchCounts

__all__ = [
    "Annotation",
    "Correction",
    "Dataset",
    "Estimate",
    "Images",
    "Model",
    "Preprocessing",
    "Region",
    "RegionChange",
    "RegionPictures",
    "Release",
    "Run",
    "SearchCounts",
]
