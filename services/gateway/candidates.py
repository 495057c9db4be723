"""Candidates of a model whose champion has changed: nobody asks for them any more."""

from defuse.v1 import corrector_service_pb2, corrector_service_pb2_grpc

from services.gateway.trials import Trials
from services.runtime.channels import Peer


class Candidates:
    """Takes candidates out of service."""

    def __init__(self, trials: Trials, corrector: "Peer[corrector_service_pb2_grpc.CorrectorServiceAsyncStub]") -> None:
        self._trials = trials
        self._corrector = corrector

    async def retire(self, model: str) -> None:
        """End the trial of a model; then nothing asks for its candidates, and none is served any more."""
        if trial := await self._trials.of_model(model):
            await self._trials.stop(trial.name)
        wanted = corrector_service_pb2.WithdrawCandidatesRequest(model=model)
        await self._corrector.call(lambda stub, **how: stub.WithdrawCandidates(wanted, **how))
