"""Run as a script: builds what is named on the command line without a GPU, and prints what came of it as JSON.

python build_without_gpu.py FOLDER MODEL PRECISION ATTEND_TO [--convert]: MODEL is "stack" or a family of the zoo. With
``--convert`` nothing is built: every op is asked for its converter.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import without_gpu
from families import family
from modcompile.runtimes.torch_trt.builder import lower_model
from tiny import Block, Stack, randn, randomise_routers
from tolerances import farthest

import modcompile as mc
from modcompile.engine import build_engine
from modcompile.manifest import read_manifest

ROWS = 33


def make(name, attend_to):
    """A converted model, and inputs of the engine's shapes."""
    if name == "stack":
        inputs = {"hidden": randn(2, ROWS, 8),
                  "attention_mask": (torch.arange(ROWS) < torch.tensor([[ROWS], [9]])).long()}
        model = Stack(Block(), Block())
    else:
        inputs = family(name).example()
        model = family(name).build()
    config = mc.MoDConfig(capacity_ratio=0.25, attend_to=attend_to)
    return randomise_routers(mc.convert(model, inputs, config)), inputs


def converted(mod, inputs, precision):
    """Torch-TensorRT's own lowering of the program: the ops without a converter, and how far its numbers are off."""
    from torch_tensorrt.dynamo import CompilationSettings
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering

    flat, program, _ = lower_model(mod, precision, {name: tuple(value.shape) for name, value in inputs.items()})
    settings = CompilationSettings()
    program = pre_export_lowering(program, settings).run_decompositions(get_decompositions())
    graph_module = post_lowering(program.module(), settings)
    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    tensors = [inputs[spec.name].to(node.meta["val"].dtype)
               for spec, node in zip(mod.inputs, flat.graph.find_nodes(op="placeholder"), strict=True)]
    with torch.no_grad():
        # In the same types: what the precision itself costs is no concern of the converters'.
        deviation = farthest(list(graph_module(*tensors)), list(flat(*tensors)))
    return {"ops": sorted({str(node.target) for node in calls}), "deviation": float(deviation),
            "without_converter": sorted({str(node.target) for node in calls if DYNAMO_CONVERTERS.get(node) is None})}


def built(mod, inputs, precision, folder):
    """The whole way: an engine folder, and the network that was in it."""
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    engine = build_engine(mod, folder, runtime="torch-tensorrt", precision=precision, shapes=shapes)
    manifest = read_manifest(folder)
    return {"runtime": engine.runtime, "type": type(engine).__name__, "created_with": manifest.created_with,
            "inputs": [(spec.name, list(spec.shape), spec.dtype) for spec in manifest.inputs],
            "outputs": [(spec.name, list(spec.shape), spec.dtype) for spec in manifest.outputs],
            "capacities": [block.capacity for block in manifest.routed_blocks], "network": without_gpu.networks[-1]}


def main():
    folder, name, precision, attend_to, *convert = sys.argv[1:]
    mod, inputs = make(name, attend_to)
    result = converted(mod, inputs, precision) if convert else built(mod, inputs, precision, folder)
    print(json.dumps(result))


main()
