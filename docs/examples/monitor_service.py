"""Report what a classifier answered for two images, and say later what one of them shows."""

import os

import grpc
from defuse.v1 import monitor_pb2, monitor_service_pb2, monitor_service_pb2_grpc

pictures = {"photo-1": bytes(28 * 28), "photo-2": bytes([255]) * (28 * 28)}  # height x width x channels bytes each
observations = [
    monitor_pb2.Observation(id=name, picture=picture, scores=[0.1] * 10, version="1")
    for name, picture in pictures.items()
]
with grpc.insecure_channel(os.environ["DEFUSE_GATEWAY"]) as channel:
    monitor = monitor_service_pb2_grpc.MonitorServiceStub(channel)
    batch = monitor_service_pb2.ReportRequest(model="models/digits", batch_id="b-1", observations=observations)
    print(monitor.Report(iter([batch]), timeout=30).stored, "stored")
    truths = monitor_service_pb2.AttachTruthRequest(model="models/digits", truths={"photo-1": "7"})
    print(monitor.AttachTruth(truths, timeout=30).attached, "labelled")
