"""Find, name, fix and watch the systematic failures of a deployed image classifier.

>>> from defuse import Client
>>> with Client() as client:  # doctest: +SKIP
...     run = client.wait_for_run("first")
...     print(client.regions("first")[0])
"""

from defuse.client import Client
from defuse.errors import (
    AlreadyExists,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    DefuseError,
    Internal,
    InvalidInput,
    NotFound,
    NotReady,
    StoreFull,
    Unavailable,
)
from defuse.latent_space import LatentSpace, Walk
from defuse.values import (
    Annotation,
    Choice,
    Correction,
    CorrectionPoint,
    CostEstimate,
    Dataset,
    Estimate,
    Failure,
    FailureBatch,
    GroupCounts,
    Model,
    PairedDifference,
    Preflight,
    Preprocessing,
    RealImage,
    Region,
    RegionChange,
    RegionPair,
    RegionPictures,
    RegionsDiff,
    Release,
    Run,
    SearchCounts,
    ValidityAdvice,
)
from defuse.version import VERSION

__version__ = VERSION
__all__ = [
    "VERSION",
    "AlreadyExists",
    "Annotation",
    "Cancelled",
    "Choice",
    "Client",
    "Conflict",
    "Correction",
    "CorrectionPoint",
    "CostEstimate",
    "Dataset",
    "DeadlineExceeded",
    "DefuseError",
    "Estimate",
    "Failure",
    "FailureBatch",
    "GroupCounts",
    "Internal",
    "InvalidInput",
    "LatentSpace",
    "Model",
    "NotFound",
    "NotReady",
    "PairedDifference",
    "Preflight",
    "Preprocessing",
    "RealImage",
    "Region",
    "RegionChange",
    "RegionPair",
    "RegionPictures",
    "RegionsDiff",
    "Release",
    "Run",
    "SearchCounts",
    "StoreFull",
    "Unavailable",
    "ValidityAdvice",
    "Walk",
]
