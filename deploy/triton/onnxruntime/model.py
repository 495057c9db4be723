"""A Triton backend named `onnxruntime`, in Python: serves the same repository entries as NVIDIA's C++ backend.

Runs inside the wheel's Triton, in an environment of its own. Each instance opens `<version>/model.onnx` and answers all
requests of a batch with one run of the graph.
"""

import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance of one version of a model."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self._session = onnxruntime.InferenceSession(path, _options(config), providers=_providers(args))
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        self._batches = int(config.get("max_batch_size", 0)) > 0
        self._warm_up(config["input"])

    def execute(self, requests):
        try:
            return self._answer(requests)
        except Exception as error:  # whatever a request provokes is the answer to it
            failure = pb_utils.TritonError(str(error))
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]

    def _answer(self, requests):
        if not self._batches:
            return [self._respond(self._run(self._feed([request]))) for request in requests]
        sizes = [self._array(request, self._inputs[0]).shape[0] for request in requests]
        outputs = self._run(self._feed(requests))
        cuts = np.cumsum(sizes)[:-1]
        parts = zip(*(np.split(output, cuts) for output in outputs))
        return [self._respond(part) for part in parts]

    def _feed(self, requests):
        return {
            name: np.concatenate([self._array(request, name) for request in requests]) for name in self._inputs
        }

    def _run(self, feed):
        return self._session.run(self._outputs, feed)

    def _respond(self, outputs):
        tensors = [pb_utils.Tensor(name, output) for name, output in zip(self._outputs, outputs)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _warm_up(self, inputs):
        """Run once, so that the first caller does not wait for it and a graph that cannot run is refused at load."""
        batch = [1] if self._batches else []
        self._run(
            {
                entry["name"]: np.zeros(
                    [*batch, *map(int, entry["dims"])], pb_utils.triton_string_to_numpy(entry["data_type"])
                )
                for entry in inputs
            }
        )

    @staticmethod
    def _array(request, name):
        return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def _options(config):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = _intra_op_threads(config)
    # A thread that spins while it waits takes a core from the decoder: on two shared cores, with the two instances that
    # Triton starts by default, 5,200 decoded and classified images a second; without spinning and with one, 9,800.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _intra_op_threads(config):
    """Return what `parameters` of config.pbtxt says under the name that NVIDIA's backend reads; 0 is one per core."""
    count = config.get("parameters", {}).get("intra_op_thread_count", {}).get("string_value", "0")
    if not count.isdecimal():
        raise ValueError(f"parameter intra_op_thread_count is {count!r}; give a whole number, 0 for one thread per core")
    return int(count)


def _providers(args):
    """Return where the graph runs: on the GPU that Triton gives the instance, if this ONNX Runtime can use one."""
    cpu = "CPUExecutionProvider"
    if args["model_instance_kind"] == "GPU" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # CUDA and cuDNN as wheels, which no library path leads to
        return [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}), cpu]
    return [cpu]
