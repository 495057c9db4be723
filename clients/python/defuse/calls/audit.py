"""What callers changed."""

from defuse.steps import Call, Steps
from defuse.v1 import audit_pb2
from defuse.v1 import gateway_service_pb2 as pb
from defuse.values import AuditEvent


def audit_events(limit: int = 50) -> Steps[list[AuditEvent]]:
    """Return the latest calls that changed something, or were to, newest first. For admins."""
    found: list[audit_pb2.AuditEvent] = []
    request = pb.ListAuditEventsRequest()
    while True:
        request.page_size = limit - len(found)
        answer = yield Call(method="ListAuditEvents", request=request)
        found += answer.events
        if len(found) >= limit or not answer.next_page_token:
            return [AuditEvent.from_proto(event) for event in found]
        request.page_token = answer.next_page_token
