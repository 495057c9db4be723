"""The frozen values that the client returns, with plain ids."""

from defuse.values.correction import Choice, Correction, CorrectionPoint, GateCheck, GateVerdict, RegionChange
from defuse.values.model import Dataset, Guard, Model, Preprocessing
from defuse.values.monitor import Alert, AuditEvent, MonitorConfig, MonitorState, RegionHits
from defuse.values.primitives import Estimate, PairedDifference
from defuse.values.region import (
    Annotation,
    Images,
    Interpolation,
    RealImage,
    Region,
    RegionPair,
    RegionPictures,
    RegionsDiff,
)
from defuse.values.release import OperationStatus, Release, Trial, TrialCounts
from defuse.values.run import (
    CostEstimate,
    Failure,
    FailureBatch,
    GroupCounts,
    Pilot,
    Preflight,
    Run,
    SearchCounts,
    ValidityAdvice,
)

__all__ = [
    "Alert",
    "Annotation",
    "AuditEvent",
    "Choice",
    "Correction",
    "CorrectionPoint",
    "CostEstimate",
    "Dataset",
    "Estimate",
    "Failure",
    "FailureBatch",
    "GateCheck",
    "GateVerdict",
    "GroupCounts",
    "Guard",
    "Images",
    "Interpolation",
    "Model",
    "MonitorConfig",
    "MonitorState",
    "OperationStatus",
    "PairedDifference",
    "Pilot",
    "Preflight",
    "Preprocessing",
    "RealImage",
    "Region",
    "RegionChange",
    "RegionHits",
    "RegionPair",
    "RegionPictures",
    "RegionsDiff",
    "Release",
    "Run",
    "SearchCounts",
    "Trial",
    "TrialCounts",
    "ValidityAdvice",
]
