"""What a recorded run needs stays as long as the record does; on a GPU, and with torch's CUDA calls taken away."""

import contextlib
import gc
import weakref
from unittest import mock

import pytest
import torch
from modcompile.runtimes.aoti.cuda_graph import CudaGraph


class Model:
    """Holds its weights as a package does, and nobody else holds the model."""

    def __init__(self, device):
        self.weight = torch.randn(512, 512, device=device)

    def __call__(self, tensors):
        return [tensors[0] @ self.weight]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")])])
def device(request, monkeypatch):
    if request.param == "cpu":
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
        for name in ("current_stream", "Stream", "CUDAGraph", "Event"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return request.param


def test_the_model_stays(device):
    model = Model(device)
    alive = weakref.ref(model)
    x = torch.randn(3, 512, device=device)
    expected = x @ model.weight
    graph = CudaGraph(model, [x.clone()])
    del model
    gc.collect()
    assert alive() is not None
    (found,) = graph([x])
    assert torch.allclose(found, expected)
    del graph
    gc.collect()
    assert alive() is None
