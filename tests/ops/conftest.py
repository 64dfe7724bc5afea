"""ONNX models of one op each, built on the function bodies under test."""

import functools
from collections.abc import Callable

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.inliner
import onnxruntime
import pytest
import torch

from modcompile.ops import ONNX_DOMAIN, ONNX_DOMAIN_VERSION, onnx_functions

# Name, element type and shape of each input or output.
Spec = tuple[tuple[str, int, tuple[int | str, ...]], ...]
Run = Callable[..., list[np.ndarray]]

# Of opset 21; ONNX Runtime refuses a model whose IR is newer than it knows.
IR_VERSION = 10


def _one_op_model(op_type: str, inputs: Spec, outputs: Spec, opset: int, inlined: bool) -> onnx.ModelProto:
    node = onnx.helper.make_node(
        op_type, [name for name, *_ in inputs], [name for name, *_ in outputs], domain=ONNX_DOMAIN
    )
    graph = onnx.helper.make_graph(
        [node],
        op_type,
        [onnx.helper.make_tensor_value_info(*spec) for spec in inputs],
        [onnx.helper.make_tensor_value_info(*spec) for spec in outputs],
    )
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(ONNX_DOMAIN, ONNX_DOMAIN_VERSION)]
    model = onnx.helper.make_model(
        graph, opset_imports=opsets, functions=onnx_functions(opset), ir_version=IR_VERSION
    )
    onnx.checker.check_model(model, full_check=True)
    if inlined:
        model = onnx.inliner.inline_local_functions(model)
        assert not model.functions
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(model, full_check=True)
    return model


@functools.cache
def _ort_run(op_type: str, inputs: Spec, outputs: Spec, opset: int, inlined: bool) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = _one_op_model(op_type, inputs, outputs, opset, inlined)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        return session.run(None, {name: array for (name, *_), array in zip(inputs, arrays, strict=True)})

    return run


@pytest.fixture(
    scope="session",
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def one_op_model() -> Callable[[str, Spec, Spec, int, bool], onnx.ModelProto]:
    """A checked model that is one node of an op type, or its body when inlined."""
    return _one_op_model


@pytest.fixture(scope="session")
def ort_run() -> Callable[[str, Spec, Spec, int, bool], Run]:
    """The same through ONNX Runtime: arrays in, arrays out, in the order of the specs."""
    return _ort_run
