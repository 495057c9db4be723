"""Data sets."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from defuse.calls.requests import new_id
from defuse.steps import Call, Steps, Work
from defuse.uploads import dataset_file, upload_file
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import Dataset

# The services read a whole data set, perhaps from a URL, before they answer.
_DATASET_DEADLINE_S = 3600.0


def add_dataset(
    source: str | Path, *, seed: int = 0, on_progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Steps[Dataset]:
    """Make a data set of a directory of class folders, an `.npz`, or a URL that the services can read.

    `on_progress` is told the bytes sent and the bytes in all. What the gateway has already is not sent again.
    """
    request = pb.CreateDatasetRequest(display_name=str(source), seed=seed, request_id=new_id())
    if "://" in str(source):
        request.uri = str(source)
    else:
        with ExitStack() as stack:
            path = yield Work(function=lambda: stack.enter_context(dataset_file(Path(source))))
            request.file_digest = yield from upload_file(path, on_progress)
    answer = yield Call(method="CreateDataset", request=request, timeout_s=_DATASET_DEADLINE_S)
    return Dataset.from_proto(answer.dataset)
