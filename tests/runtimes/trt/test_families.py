"""Whole models become TensorRT-RTX engines: families x forms x precisions, static and with a dynamic batch.

A form is a function that writes one ONNX file with dynamic dims, which both engines are then built from.
"""

import functools

import families
import pytest
import torch
from modcompile.runtimes.trt import layers

from modcompile.engine import build_engine
from modcompile.export import export_onnx

pytestmark = pytest.mark.tensorrt
pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
FAMILIES = ("gpt2", "llama", "bert", "vit")
# B batch  S rows: neither is that of the example that the model was captured with.
BATCHES, ROWS = (1, 3, 5), 33


def export_dense(family, precision, path):
    """Writes the family's model as it is."""
    dtype = DTYPES[precision]
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in family.example().items()}
    return export_onnx(family.build().to(dtype), path, example_inputs=inputs)


FORMS = {"dense": export_dense}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the ONNX file of a form of a family, exported once."""
    folder = tmp_path_factory.mktemp("onnx")

    @functools.cache
    def export(form, name, precision):
        return FORMS[form](families.family(name), precision, folder / f"{form} {name} {precision}.onnx")

    return export


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.long)])
def test_engines_of_a_family(exported, tmp_path, form, name, precision):
    path = exported(form, name, precision)
    family = families.family(name)
    shapes = [{input_name: tuple(x.shape) for input_name, x in family.inputs(batch, ROWS, None, seed=0).items()}
              for batch in BATCHES]
    static = build_engine(path, tmp_path / "static", runtime="tensorrt-rtx", shapes=shapes[-1])
    ranges = {input_name: tuple(shape[input_name] for shape in shapes) for input_name in shapes[0]}
    dynamic = build_engine(path, tmp_path / "dynamic", runtime="tensorrt-rtx", shapes=ranges)

    assert {spec.name: spec.shape for spec in static.inputs} == shapes[-1]
    for fixed, varying in zip((*static.inputs, *static.outputs), (*dynamic.inputs, *dynamic.outputs), strict=True):
        assert fixed.shape[0] == BATCHES[-1] and isinstance(varying.shape[0], str)
        assert fixed.shape[1:] == varying.shape[1:] and fixed.dtype == varying.dtype
    for engine in (static, dynamic):
        assert_precision(layers(engine.folder), precision)


def assert_precision(found, precision):
    """Matrix products read and write the precision."""
    products = [layer for layer in found if layer.type in ("gemm", "runtime_fusion")]
    dtypes = {tensor.dtype for layer in products for tensor in (*layer.inputs, *layer.outputs)}
    assert dtypes == {"float16" if precision == "fp16" else "float32"}
