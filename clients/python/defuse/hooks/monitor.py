"""The monitor: what a program hooks into its classifier's channel, or tells itself."""

import atexit
import os
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self

import grpc
import numpy as np
import numpy.typing as npt

from defuse.bearer import Bearer
from defuse.connection import find_gateway
from defuse.hooks.background import Background
from defuse.hooks.buffer import OBSERVATIONS, TRUTHS, Buffer, Item
from defuse.hooks.complaints import Complaints
from defuse.hooks.counts import Counts
from defuse.hooks.courier import Courier
from defuse.hooks.drops import Dropped
from defuse.hooks.logged import Image, Logged, Truth, content_of
from defuse.hooks.observation import Observation
from defuse.hooks.reporter import Redact, Reporter
from defuse.hooks.sampling import Numbers, Sampler
from defuse.hooks.splitting import MODEL_INFER, Asked, Exchange, images_in

_AT_EXIT_S = 2.0


class Monitor(grpc.UnaryUnaryClientInterceptor):
    """Reports what a classifier answers in production to a gateway, in the background.

    It is an interceptor for `grpc.intercept_channel`; `defuse.hooks.watch` hooks it into a `tritonclient`, `log` takes
    what is asked in any other way. A call never waits for it, never fails by it, and is never changed by it: what
    cannot be reported is dropped and counted, with the reason.

    Args:
        gateway: HOST:PORT. By default `DEFUSE_GATEWAY`, else the local stack that `defuse up` started.
        share: Part of the requests that is reported, in [0, 1]; the same id is always reported or never.
        capacity: Observations that wait at most; more are dropped.
        capacity_bytes: What they take at most.
        redact: Is given each observation before it is sent, in the background; what it returns is sent, None withholds.
        token: Who reports, where the gateway asks for it. By default that of the environment, as for `defuse.Client`.
    """

    def __init__(
        self,
        gateway: str | None = None,
        *,
        share: float = 1.0,
        capacity: int = 10_000,
        capacity_bytes: int = 64 * 1024 * 1024,
        redact: Redact | None = None,
        token: str | None = None,
    ) -> None:
        self._gateway = gateway or find_gateway()
        self._bearer = Bearer(token, self._gateway)
        self._sampler = Sampler(share)
        self._capacity, self._capacity_bytes = capacity, capacity_bytes
        self._redact = redact
        self._complaints = Complaints()
        self._closed = False
        # A parent's channel must not be taken apart in its child.
        self._left_to_parents: list[Background] = []
        self._start()
        atexit.register(self.close, _AT_EXIT_S)
        os.register_at_fork(after_in_child=partial(_in_child, weakref.ref(self)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def counts(self) -> Counts:
        """What became of the observations so far."""
        return self._buffer.counts(OBSERVATIONS)

    @property
    def truth_counts(self) -> Counts:
        """What became of the truths so far."""
        return self._buffer.counts(TRUTHS)

    def close(self, timeout_s: float = 5.0) -> None:
        """Report what waits, for `timeout_s` seconds at most, then drop it; what is seen afterwards is dropped, too."""
        atexit.unregister(self.close)
        self._closed = True
        self._buffer.close()
        self._background.close(timeout_s)

    def log(
        self,
        model: str,
        image: Image,
        scores: npt.ArrayLike = (),
        *,
        id: str = "",  # noqa: A002  # as the contract names it
        version: str = "",
        truth: str = "",
    ) -> None:
        """Report an image and what a model answered of it, however it was asked.

        `image` is a stored picture (h, w, c) of uint8, the model's own input as real numbers or as bytes, or None.
        """
        self._guarded(self._log, model, image, scores, id or self._numbers.next_id(), version, truth)

    def truth(self, model: str, id: str, label: str) -> None:  # noqa: A002  # as the contract names it
        """Say what an observation really shows, by its class name; may come long after it."""
        self._guarded(self._attach, model, id, label, kind=TRUTHS)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        """Make a call, and look at its answer when it comes."""
        if client_call_details.method != MODEL_INFER:
            return continuation(client_call_details, request)
        asked = self.asked(request)
        call = continuation(client_call_details, request)
        self._guarded(self._await, call, asked)
        return call

    def asked(self, request: Any) -> Asked | None:
        """Return what is to be kept of a request until it is answered; never raises. For hooks."""
        try:
            return self._asked(request)
        except Exception as error:  # noqa: BLE001  # nothing of this may reach the caller
            self._defect(OBSERVATIONS, error)
            return None

    def answered(self, asked: Asked | None, response: Any) -> None:
        """Report a request with its answer; never raises. For hooks."""
        if asked is not None:
            self._guarded(self._answered, asked, response)

    def _asked(self, request: Any) -> Asked:
        request_id = request.id or self._numbers.next_id()
        return Asked(
            id=request_id,
            model=request.model_name,
            count=images_in(request),
            kind=type(request),
            content=request.SerializeToString() if self._sampler.takes(request_id) else None,
        )

    def _await(self, call: Any, asked: Asked | None) -> None:
        call.add_done_callback(partial(self._ended, asked))

    def _ended(self, asked: Asked | None, call: Any) -> None:
        if call.code() is grpc.StatusCode.OK:
            self.answered(asked, call.result())

    def _answered(self, asked: Asked, response: Any) -> None:
        if asked.content is None:
            self._buffer.pass_over(OBSERVATIONS, asked.count)
        elif asked.count:
            self._put(Exchange.of(asked, asked.content, response))

    def _log(
        self, model: str, image: Image, scores: npt.ArrayLike, observation_id: str, version: str, truth: str
    ) -> None:
        if not self._sampler.takes(observation_id):
            self._buffer.pass_over(OBSERVATIONS, 1)
            return
        observation = Observation(
            model=model,
            id=observation_id,
            time=datetime.now(UTC),
            version=version,
            scores=tuple(np.asarray(scores, np.float32).ravel().tolist()),
            **content_of(image),
        )
        self._put(Logged(observation))
        if truth:
            self.truth(model, observation_id, truth)

    def _attach(self, model: str, observation_id: str, label: str) -> None:
        if self._sampler.takes_row(observation_id):
            self._put(Truth(model, observation_id, label))
        else:
            self._buffer.pass_over(TRUTHS, 1)

    def _put(self, item: Item) -> None:
        self._background.start()
        self._background.tell(self._buffer.put(item))

    def _guarded(self, function: Callable[..., None], *arguments: Any, kind: str = OBSERVATIONS) -> None:
        """Do something on the caller's thread of which nothing may reach the caller."""
        try:
            function(*arguments)
        except Dropped as drop:
            self._buffer.drop(kind, 1, drop.reason)
            self._complaints.say(drop.reason, drop.message)
        except Exception as error:  # noqa: BLE001  # see above
            self._defect(kind, error)

    def _defect(self, kind: str, error: Exception) -> None:
        self._buffer.drop(kind, 1, "defect")
        self._complaints.say_once("defect", "the hook has a defect", error)

    def _start(self) -> None:
        """Begin with nothing seen; a thread and a connection are made when there is something to report."""
        self._numbers = Numbers()
        self._buffer = Buffer(self._capacity, self._capacity_bytes)
        courier = Courier(self._gateway, self._bearer, self._complaints)
        reporter = Reporter(self._buffer, courier, self._complaints, self._redact)
        self._background = Background(reporter, courier)

    def _start_anew(self) -> None:
        """Begin again in a child: what waited is its parent's to report, whose locks may be held for ever here."""
        self._left_to_parents.append(self._background)
        self._start()
        if self._closed:
            self._buffer.close()


def _in_child(monitor: "weakref.ref[Monitor]") -> None:
    if found := monitor():
        found._start_anew()  # noqa: SLF001  # a method of this file's
