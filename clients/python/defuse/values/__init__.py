"""What the client returns: small frozen values, with plain ids instead of resource names."""

from defuse.values.audit import AuditEvent
from defuse.values.correction import Choice, Correction, CorrectionPoint, PairedDifference, RegionChange
from defuse.values.dataset import Dataset
from defuse.values.estimate import Estimate
from defuse.values.failure import CostEstimate, Failure, FailureBatch
from defuse.values.gate import GateCheck, GateVerdict
from defuse.values.guard import Guard
from defuse.values.model import Model, Preprocessing, Release
from defuse.values.monitor import Alert, Monitor, MonitorConfig, RegionHits
from defuse.values.operation import OperationStatus
from defuse.values.region import Annotation, Images, RealImage, Region, RegionPair, RegionPictures, RegionsDiff
from defuse.values.run import GroupCounts, Preflight, Run, SearchCounts, ValidityAdvice
from defuse.values.trial import Trial, TrialCounts
from defuse.values.walk import Walk

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
    "Model",
    "Monitor",
    "MonitorConfig",
    "OperationStatus",
    "PairedDifference",
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
    "Walk",
]
