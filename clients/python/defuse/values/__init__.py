"""What the client returns: small frozen values, with plain ids instead of resource names."""

from defuse.values.correction import Correction, RegionChange
from defuse.values.dataset import Dataset
from defuse.values.estimate import Estimate
from defuse.values.failure import CostEstimate, Failure, FailureBatch
from defuse.values.model import Model, Preprocessing, Release
from defuse.values.region import Annotation, Images, Region, RegionPictures
from defuse.values.run import Preflight, Run, SearchCounts

__all__ = [
    "Annotation",
    "Correction",
    "CostEstimate",
    "Dataset",
    "Estimate",
    "Failure",
    "FailureBatch",
    "Images",
    "Model",
    "Preflight",
    "Preprocessing",
    "Region",
    "RegionChange",
    "RegionPictures",
    "Release",
    "Run",
    "SearchCounts",
]
