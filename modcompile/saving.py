"""Saves a routed model as a folder of safetensors and JSON, and loads it without its source's code. No pickle.

The folder holds ``modcompile.json`` (what the model is, and the hash of every other file), ``graph.json`` (the routed
and the dense graph) and ``model.safetensors``.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from modcompile.config import MoDConfig
from modcompile.errors import IntegrityError, RuntimeUnavailableError, UsageError
from modcompile.files import hash_file, list_files, new_folder, read_file
from modcompile.interface import Interface
from modcompile.manifest import RoutedBlock
from modcompile.model import MoDModel
from modcompile.program import Program
from modcompile.routers import make_router, router_path

__all__ = ["MODEL_FILE", "load", "save_model"]

FORMAT = 1
MODEL_FILE, GRAPH_FILE, WEIGHTS_FILE = "modcompile.json", "graph.json", "model.safetensors"
# A description is a few hundred bytes per block; a graph a few hundred per node.
LIMIT_BYTES = 256 * 2**20


def save_model(model: MoDModel, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes the model into a new folder, which appears whole or not at all.

    Args:
        model: What to save; its tensors may be on any device.
        folder: Where to.
        overwrite: Replace a folder that holds a saved model.

    Raises:
        UsageError: The folder exists, or cannot be written.
    """
    tensors = model.tensors()
    names: dict[int, str] = {}
    aliases = {name: names.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    own = {name: tensors[name] for name, first in aliases.items() if name == first}
    with new_folder(folder, marker=MODEL_FILE, overwrite=overwrite) as staging:
        graphs = {"routed": model.program.to_json(), "dense": model.dense_program.to_json()}
        (staging / GRAPH_FILE).write_text(json.dumps(graphs), encoding="utf-8")
        safetensors.torch.save_file(_own_storage(own), staging / WEIGHTS_FILE)
        content = {
            "format": FORMAT,
            "config": model.config.model_dump(mode="json"),
            "interface": model.interface.to_json(),
            "hints": model.hints,
            "passes": model.passes,
            "routed_blocks": [block.model_dump(mode="json") for block in model.routed_blocks],
            "aliases": {name: first for name, first in aliases.items() if name != first},
            # In order, aliases included.
            "parameters": [name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)],
            "non_persistent": sorted(model.non_persistent()),
            "files": {name: hash_file(staging / name)[0] for name in (GRAPH_FILE, WEIGHTS_FILE)},
        }
        content = {"sha256": _digest(content), **content}
        (staging / MODEL_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    return Path(folder)


def load(folder: str | os.PathLike) -> MoDModel:
    """Reads a model that ``save_pretrained`` wrote, in evaluation mode on the CPU. The source's class is not needed.

    Every hash is checked before a file is parsed. Output classes are used where they are imported already; else outputs
    come by name (``modcompile.interface.Outputs``).

    Raises:
        IntegrityError: A file is missing, truncated or edited; it is named.
        RuntimeUnavailableError: A folder of a newer format.
    """
    folder = Path(folder)
    content = _read_description(folder)
    expected = sorted([MODEL_FILE, *content["files"]])
    if list_files(folder) != expected:
        raise IntegrityError("the folder does not hold the files it should", expected=", ".join(expected),
                             found=", ".join(list_files(folder)), where=folder)
    for name, digest in content["files"].items():
        if hash_file(folder / name)[0] != digest:
            raise IntegrityError("a file is not what was saved", expected=f"SHA-256 {digest}",
                                 found=hash_file(folder / name)[0], where=folder / name, fix="save the model again")
    try:
        graphs = json.loads(read_file(folder / GRAPH_FILE, LIMIT_BYTES))
        own = safetensors.torch.load_file(folder / WEIGHTS_FILE)
        model = _assemble(content, graphs, own)
    except (KeyError, TypeError, ValueError, ValidationError, safetensors.SafetensorError) as error:
        raise IntegrityError("the saved model does not fit together", found=f"{type(error).__name__}: {error}",
                             where=folder, fix="save the model again") from error
    # The graph may name the device that it was saved on.
    model.to("cpu")
    model.propagate_shapes()
    return model


def _own_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors wants them."""
    made, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        made[name] = value
    return made


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_FILE
    if not path.exists():
        raise UsageError("the folder holds no saved model", expected=MODEL_FILE, found=folder, where=folder,
                         fix="give a folder that save_pretrained or modcompile convert wrote")
    try:
        content = json.loads(read_file(path, LIMIT_BYTES))
        digest = content.pop("sha256")
        version = content["format"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise IntegrityError("the model's description cannot be read", found=str(error), where=path,
                             fix="save the model again") from error
    if isinstance(version, int) and version > FORMAT:
        raise RuntimeUnavailableError("the model was saved by a newer version", expected=f"format {FORMAT} or older",
                                      found=version, where=path, fix="update modcompile")
    if _digest(content) != digest or version != FORMAT:
        raise IntegrityError("the model's description was edited", expected=f"SHA-256 {digest}", found=_digest(content),
                             where=path, fix="save the model again")
    if set(content.get("files", ())) != {GRAPH_FILE, WEIGHTS_FILE}:
        raise IntegrityError("the description lists other files", expected=f"{GRAPH_FILE}, {WEIGHTS_FILE}",
                             found=", ".join(content.get("files", ())), where=path)
    return content


def _assemble(content: dict, graphs: dict, own: dict[str, torch.Tensor]) -> MoDModel:
    parameters = set(content["parameters"])
    own = {name: nn.Parameter(t, requires_grad=t.is_floating_point()) if name in parameters else t
           for name, t in own.items()}
    aliases = content["aliases"]
    tensors = {name: own[aliases.get(name, name)] for name in dict.fromkeys([*content["parameters"], *own, *aliases])}
    config = MoDConfig(**content["config"])
    blocks = [RoutedBlock(**block) for block in content["routed_blocks"]]
    routers: dict[str, nn.Module] = {}
    for block in blocks:
        path = router_path(block.path)
        # Its parameters are replaced, so their sizes here are nobody's.
        router = make_router(config, 1, block is blocks[0])
        for name in list(router._parameters):
            router.register_parameter(name, cast(nn.Parameter, tensors.pop(f"{path}.{name}")))
        routers[path] = router
    graph_module = Program.from_json(graphs["routed"]).assemble(tensors, routers, frozenset(content["non_persistent"]))
    return MoDModel(graph_module, Interface.from_json(content["interface"]), content["hints"], content["passes"],
                    config, blocks, Program.from_json(graphs["dense"])).eval()
