"""Contenders that run inference only, from graphs: ONNX Runtime and OpenVINO."""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from attnlab._src.bench.cases import WINDOW, Case
from attnlab._src.bench.contenders import Prepared, refused_on_cpus, too_large
from attnlab._src.bench.machine import cores


def _refusal(case: Case, *packages: str) -> str | None:
    if case.spec.dtype != "float32":
        return "it is compared in float32 only"
    return refused_on_cpus(case, *packages) or too_large(case)


def _forward_only(name: str, backward: bool) -> None:
    if backward:
        raise NotImplementedError(f"{name} has no backward pass")


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _prepared(call: Callable[[], Any], output: Callable[[Any], np.ndarray]) -> Prepared:
    """Calls once, which compiles; ``output`` makes ``[B, T, N, D]``."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Prepared(call, lambda found: {"output": output(found)}, seconds, None)


class OnnxRuntimePeer:
    """ONNX Runtime's ``MultiHeadAttention`` and ``GroupQueryAttention``.

    The second one computes patterns that are causal, or causal windows; other masks are
    dense arrays for the first one.
    """

    name = "onnxruntime"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        spec = case.spec
        if spec.pattern not in _OF_GROUPS and spec.heads != spec.key_heads:
            return "it has grouped queries for causal patterns only"
        if spec.pattern in _OF_GROUPS and spec.queries != spec.length:
            return "it is compared on whole sequences"
        return _refusal(case, "onnx", "onnxruntime")

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        _forward_only("ONNX Runtime", backward)
        onnxruntime = _module("onnxruntime")
        s = case.spec
        given = {
            name: np.asarray(x).reshape(*x.shape[:2], -1)
            for name, x in (("q", case.query), ("k", case.key), ("v", case.value))
        }
        if s.pattern in _OF_GROUPS:
            window = WINDOW if s.pattern == "causal_window" else -1
            options = {"kv_num_heads": s.key_heads, "local_window_size": window}
            past = np.zeros((s.batch, s.key_heads, 0, s.head_size), np.float32)
            last = np.full((s.batch,), s.length - 1, np.int32)
            total = np.array([s.length], np.int32)
            given |= {"past_k": past, "past_v": past, "last": last, "total": total}
            kind = "GroupQueryAttention"
        else:
            options, kind = {}, "MultiHeadAttention"
            mask = case.dense_mask()
            if mask is not None:
                # After keys and values: bias, padding; neither is given.
                given["bias"] = np.where(np.asarray(mask), 0, -np.inf).astype("f4")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = cores()
        session = onnxruntime.InferenceSession(
            _graph(kind, given, num_heads=s.heads, **options),
            settings,
            providers=["CPUExecutionProvider"],
        )
        shape = s.batch, s.queries, s.heads, s.head_size
        return _prepared(
            lambda: session.run(["output"], given)[0], lambda x: x.reshape(shape)
        )


#: Patterns that ``GroupQueryAttention`` computes.
_OF_GROUPS = ("causal", "causal_window")


def _graph(kind: str, given: dict[str, np.ndarray], **options: int) -> bytes:
    """A model of one operator, with the names of its inputs in their order."""
    helper = _module("onnx.helper")

    def value(name: str, x: np.ndarray) -> Any:
        dtype = helper.np_dtype_to_tensor_dtype(x.dtype)
        return helper.make_tensor_value_info(name, dtype, x.shape)

    names = [*given]
    if "bias" in names:
        names[3:3] = ["", ""]
    outputs = ["output"] + ["k_now", "v_now"] * (kind == "GroupQueryAttention")
    node = helper.make_node(kind, names, outputs, domain="com.microsoft", **options)
    float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    graph = helper.make_graph(
        [node],
        kind,
        [value(name, x) for name, x in given.items()],
        [helper.make_tensor_value_info(name, float32, None) for name in outputs],
    )
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions)
    model.ir_version = 10
    return model.SerializeToString()


class OpenVinoPeer:
    """OpenVINO's ``ScaledDotProductAttention``; masks but causal are dense arrays."""

    name = "openvino"

    def refusal(self, case: Case) -> str | None:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        if case.spec.heads != case.spec.key_heads:
            return "it has no grouped queries"
        return _refusal(case, "openvino")

    def prepare(self, case: Case, backward: bool) -> Prepared:
        """See :class:`attnlab._src.bench.contenders.Contender`."""
        _forward_only("OpenVINO", backward)
        openvino, opset13 = _module("openvino"), _module("openvino.opset13")
        given = [
            np.ascontiguousarray(np.asarray(x).swapaxes(1, 2))
            for x in (case.query, case.key, case.value)
        ]
        inputs = [opset13.parameter(x.shape, np.float32) for x in given]
        options: dict[str, Any] = {"causal": case.spec.pattern == "causal"}
        mask = None if options["causal"] else case.dense_mask()
        if mask is not None:
            bias = np.where(np.asarray(mask), 0, -np.inf).astype(np.float32)
            options["attention_mask"] = opset13.constant(bias)
        made = opset13.scaled_dot_product_attention(*inputs, **options)
        compiled = openvino.Core().compile_model(
            openvino.Model([made.output(0)], inputs),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32",
                "INFERENCE_NUM_THREADS": cores(),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()
        return _prepared(
            lambda: request.infer(given, share_inputs=True)[0],
            lambda x: x.swapaxes(1, 2),
        )
