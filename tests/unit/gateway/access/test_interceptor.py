"""Callers before the doorkeeper: a real server whose methods say who called them."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from defuse.errors import DefuseError, PermissionDenied, Unauthenticated, from_rpc_error
from defuse.v1 import access_pb2, annotation_pb2, region_pb2, release_pb2, trial_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.v1 import gateway_service_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from services.gateway.access.interceptors import AccessInterceptor
from services.gateway.access.roles import current_caller, require, sign_request
from services.gateway.tokens import Tokens, line_of
from services.runtime.interceptors import ErrorInterceptor

Ask = Callable[[grpc.aio.Channel], Awaitable[Any]]
ROLES = ("viewer", "annotator", "operator", "admin")


class Gateway(pb_grpc.GatewayServiceServicer):
    """Answers with the names under which it was asked."""

    async def GetVersion(self, request: pb.GetVersionRequest, context: Any) -> pb.GetVersionResponse:  # noqa: N802  # gRPC's name
        await asyncio.sleep(0)  # another call may come in between
        caller = current_caller()
        return pb.GetVersionResponse(version=caller.name if caller else "nobody")

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> Any:  # noqa: N802
        yield pb.WatchRunResponse(run={"note": getattr(current_caller(), "name", "nobody")})

    async def UploadFile(self, request_iterator: Any, context: Any) -> pb.UploadFileResponse:  # noqa: N802
        return pb.UploadFileResponse(size=sum([len(request.chunk) async for request in request_iterator]))

    async def AnnotateRegion(self, request: pb.AnnotateRegionRequest, context: Any) -> pb.AnnotateRegionResponse:  # noqa: N802
        return pb.AnnotateRegionResponse(region=region_pb2.Region(annotation=sign_request(request.annotation)))

    async def RollbackModel(self, request: pb.RollbackModelRequest, context: Any) -> pb.RollbackModelResponse:  # noqa: N802
        return pb.RollbackModelResponse(release=release_pb2.Release(actor=sign_request(request).actor))

    async def StartTrial(self, request: pb.StartTrialRequest, context: Any) -> pb.StartTrialResponse:  # noqa: N802
        return pb.StartTrialResponse(trial=sign_request(request.trial))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:  # noqa: N802
        require(access_pb2.ROLE_OPERATOR, "a list of everything")
        return pb.ListRunsResponse()


@pytest.fixture
def behind_authentication(tmp_path: Path) -> Callable[..., Any]:
    """Give what serves the gateway, to callers named like their roles, and returns what `ask` returns."""
    (tmp_path / "tokens").write_text("".join(f"{line_of(role, role, f'token of {role}')}\n" for role in ROLES))

    def serve(ask: Ask, *, tokens: bool = True) -> Any:
        async def run() -> Any:
            guards = [AccessInterceptor(Tokens(tmp_path / "tokens"))] if tokens else []
            server = grpc.aio.server(interceptors=[ErrorInterceptor(), *guards])
            pb_grpc.add_GatewayServiceServicer_to_server(Gateway(), server)
            health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            try:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    return await asyncio.wait_for(ask(channel), 30)
            finally:
                await server.stop(None)

        return asyncio.run(run())

    return serve


def of(role: str) -> dict[str, Any]:
    """Return what a call of a caller with that role has beside its request."""
    return {"metadata": [("authorization", f"Bearer token of {role}")]}


def stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.GatewayServiceStub(channel)


async def refused(call: Awaitable[Any]) -> DefuseError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value, address="here:1")


def test_methods_know_who_calls(behind_authentication: Any) -> None:
    """Each of many calls at the same time has its own caller, in unary calls and in streams."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        calls = [stub(channel).GetVersion(pb.GetVersionRequest(), **of(role)) for role in ROLES * 20]
        names = [answer.version for answer in await asyncio.gather(*calls)]
        watched = [answer.run.note async for answer in stub(channel).WatchRun(pb.WatchRunRequest(), **of("viewer"))]
        return names, watched

    assert behind_authentication(ask) == (list(ROLES * 20), ["viewer"])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ([], "NO_TOKEN"),
        ([("authorization", "Basic token of admin")], "NO_TOKEN"),
        ([("authorization", "Bearer ")], "UNKNOWN_TOKEN"),
        ([("authorization", "Bearer token of nobody")], "UNKNOWN_TOKEN"),
    ],
)
def test_nobody_comes_in_without_a_token(behind_authentication: Any, metadata: Any, reason: str) -> None:
    """Calls of every kind are refused, with a reason for programs and a remedy for people."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway = stub(channel)
        return [
            await refused(gateway.GetVersion(pb.GetVersionRequest(), metadata=metadata)),
            # Without messages: gRPC's aio client reports INTERNAL for a call that ends during a write.
            await refused(gateway.UploadFile(iter([]), metadata=metadata)),
            await refused(anext(aiter(gateway.WatchRun(pb.WatchRunRequest(), metadata=metadata)))),
        ]

    for error in behind_authentication(ask):
        assert (type(error), error.reason) == (Unauthenticated, reason)
        assert "DEFUSE_TOKEN" in error.message


def test_the_scheme_is_a_word_in_any_case(behind_authentication: Any) -> None:
    """As HTTP has it."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        return [
            (await stub(channel).GetVersion(pb.GetVersionRequest(), metadata=[("authorization", said)])).version
            for said in ("Bearer token of viewer", "bearer token of viewer", "BEARER token of viewer")
        ]

    assert behind_authentication(ask) == ["viewer"] * 3


def test_a_role_that_is_too_low(behind_authentication: Any) -> None:
    """It is refused with the name of the one that is needed; those above may do it, too."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway = stub(channel)
        error = await refused(gateway.AnnotateRegion(pb.AnnotateRegionRequest(), **of("viewer")))
        for role in ROLES[1:]:
            await gateway.AnnotateRegion(pb.AnnotateRegionRequest(), **of(role))
        return error, await refused(gateway.RollbackModel(pb.RollbackModelRequest(), **of("operator")))

    low, high = behind_authentication(ask)
    assert (type(low), low.reason, low.metadata) == (PermissionDenied, "ROLE_TOO_LOW", {"role": "annotator"})
    assert "AnnotateRegion needs the role annotator, and 'viewer' has viewer" in low.message
    assert high.metadata == {"role": "admin"}


def test_what_a_request_says_can_need_more(behind_authentication: Any) -> None:
    """A method asks for a higher role itself."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        error = await refused(stub(channel).ListRuns(pb.ListRunsRequest(), **of("annotator")))
        await stub(channel).ListRuns(pb.ListRunsRequest(), **of("operator"))
        return error

    assert "a list of everything needs the role operator" in behind_authentication(ask).message


def test_health_is_for_everybody(behind_authentication: Any) -> None:
    """A probe has no token."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())  # type: ignore[misc]

    assert behind_authentication(ask).status == health_pb2.HealthCheckResponse.SERVING


def test_a_method_that_is_not_there(behind_authentication: Any) -> None:
    """It is answered by gRPC itself, whoever asks."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/defuse.v1.GatewayService/OpenSesame")(b"")
        return caught.value.code()

    assert behind_authentication(ask) is grpc.StatusCode.UNIMPLEMENTED


def test_nobody_speaks_for_another(behind_authentication: Any) -> None:
    """The caller's name is filled in; another name is rejected, also as an approver."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        gateway = stub(channel)
        annotation = await gateway.AnnotateRegion(pb.AnnotateRegionRequest(), **of("annotator"))
        rollback = await gateway.RollbackModel(pb.RollbackModelRequest(actor="admin"), **of("admin"))
        plain, approved = trial_pb2.Trial(), trial_pb2.Trial(actor="admin", approver="admin")
        trials = [await gateway.StartTrial(pb.StartTrialRequest(trial=one), **of("admin")) for one in (plain, approved)]
        said = annotation_pb2.Annotation(annotator="ann")
        errors = [
            await refused(gateway.AnnotateRegion(pb.AnnotateRegionRequest(annotation=said), **of("annotator"))),
            await refused(gateway.RollbackModel(pb.RollbackModelRequest(actor="bob"), **of("admin"))),
            await refused(gateway.StartTrial(pb.StartTrialRequest(trial={"approver": "eve"}), **of("admin"))),
        ]
        names = (annotation.region.annotation.annotator, rollback.release.actor)
        return names, [(one.trial.actor, one.trial.approver) for one in trials], errors

    names, trials, errors = behind_authentication(ask)
    assert names == ("annotator", "admin")
    assert trials == [("admin", ""), ("admin", "admin")]
    assert {(type(error), error.reason) for error in errors} == {(PermissionDenied, "NOT_THE_CALLER")}
    assert "annotator is 'ann', and the token is that of 'annotator'" in errors[0].message


def test_without_tokens_names_are_taken_as_they_are_said(behind_authentication: Any) -> None:
    """Where callers show none, a request names whom it likes, and everybody may do everything."""

    async def ask(channel: grpc.aio.Channel) -> Any:
        await stub(channel).ListRuns(pb.ListRunsRequest())
        return (await stub(channel).RollbackModel(pb.RollbackModelRequest(actor="bob"))).release.actor

    assert behind_authentication(ask, tokens=False) == "bob"
