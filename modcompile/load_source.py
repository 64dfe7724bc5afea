"""Finds the model that a command names: a converted model's folder, a transformers folder, or a Python function."""

__all__ = ["Source", "example_for", "load_graph", "load_source", "on_device"]

import dataclasses
import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from modcompile.errors import IntegrityError, ModcompileError, RuntimeUnavailableError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modcompile.model import GraphModel, MoDModel

# B batch  S rows  C channels

Model = TypeVar("Model", bound="nn.Module")

AS_FUNCTION = "write a function that returns (model, example_inputs), and name it package.module:function"
EXAMPLE_BATCH, EXAMPLE_ROWS = 2, 16


@dataclasses.dataclass(frozen=True)
class Source:
    """A model and what to call it with.

    Attributes:
        model: The model, in evaluation mode.
        example_inputs: What it is captured with; None for a converted model, which is captured already.
    """

    model: "nn.Module"
    example_inputs: Any

    @property
    def converted(self) -> "MoDModel | None":
        """The model if it came from a folder that ``save_pretrained`` wrote."""
        return cast("MoDModel", self.model) if self.example_inputs is None else None


def on_device(model: Model, device: str) -> Model:
    """The model, moved.

    Raises:
        RuntimeUnavailableError: There is no such device.
    """
    import torch

    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise RuntimeUnavailableError("the device is not there", found=str(error).partition("\n")[0], where=device,
                                      expected="cpu, or cuda with a GPU and a torch built for it") from error


def load_source(name: str) -> Source:
    """Loads what ``name`` stands for. Nothing is ever downloaded, and no code is run but that of a named function.

    Args:
        name: One of three:

            - a folder written by ``MoDModel.save_pretrained`` (it holds ``modcompile.json``);
            - a transformers folder (``config.json`` and safetensors). The class is the first of the configuration's
              ``architectures``; weights are loaded as float32, and code in the folder is never run;
            - ``package.module:function``. The module is imported, also from the working folder, and the function is
              called without arguments; it returns ``(model, example_inputs)``.

    Raises:
        UsageError: A name that is none of the three, or a function that returns something else.
        IntegrityError: A transformers folder whose files do not fit together.
        RuntimeUnavailableError: transformers is needed and not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "modcompile.json").exists():
            from modcompile.saving import load

            return Source(load(folder), None)
        if (folder / "config.json").exists():
            return _from_transformers(folder)
        raise UsageError("the folder holds no model", expected="modcompile.json, or config.json with safetensors",
                         found=", ".join(sorted(os.listdir(folder))[:8]) or "an empty folder", where=folder)
    if ":" in name and not folder.exists():
        return _from_function(name)
    raise UsageError("the model is not found", expected="a folder, or package.module:function",
                     found="a file" if folder.exists() else "no such folder", where=name,
                     fix="a model on a hub must be downloaded to a folder first")


def load_graph(name: str) -> "GraphModel":
    """What ``load_source`` loads, as a graph: a dense model is captured."""
    from modcompile.capture import capture

    source = load_source(name)
    return source.converted or capture(source.model, source.example_inputs)


def example_for(model: Any) -> "dict[str, Tensor]":
    """Example inputs for a transformers model, from its ``main_input_name``, configuration and forward's signature.

    Returns:
        ``input_ids`` [B, S] int64 of random words, with ``attention_mask`` [B, S] int64 of ones if the forward takes
        one; or ``pixel_values`` [B, C, height, width] float32.

    Raises:
        UsageError: A model whose main input is neither.
    """
    import torch

    taken = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids":
        config = model.config.get_text_config()
        shape = (EXAMPLE_BATCH, EXAMPLE_ROWS)
        words = torch.randint(config.vocab_size, shape, generator=generator)
        padding = getattr(config, "pad_token_id", None)
        if padding is not None:
            # Some models count positions from what is not padding.
            words[words == padding] = 1 if padding == 0 else 0
        inputs = {"input_ids": words}
        if "attention_mask" in taken:
            inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
        return inputs
    size = getattr(model.config, "image_size", None)
    if model.main_input_name == "pixel_values" and size is not None:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(model.config, "num_channels", 3)
        return {"pixel_values": torch.randn(EXAMPLE_BATCH, channels, height, width, generator=generator)}
    raise UsageError("the inputs of this model are not known",
                     expected="input_ids, or pixel_values of a known image_size",
                     found=f"{model.main_input_name}; forward takes {', '.join(taken)}", where=type(model).__name__,
                     fix=AS_FUNCTION)


def _from_transformers(folder: Path) -> Source:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeUnavailableError("a transformers folder needs the package transformers", found=error, where=folder,
                                      fix='pip install "modcompile[hf]"') from error
    import torch

    # What matters of its reports is raised below.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(folder / "config.json", encoding="utf-8") as file:
        try:
            names = json.load(file).get("architectures")
        except (ValueError, AttributeError) as error:
            raise IntegrityError("this is not a JSON object", found=error, where=folder / "config.json") from error
    model_class: Any = getattr(transformers, str(names[0]), None) if names else None
    is_model = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not is_model:
        raise UsageError("the configuration names no class of transformers", expected="architectures: a model class",
                         found=names, where=folder / "config.json",
                         fix=AS_FUNCTION)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        model, report = model_class.from_pretrained(folder, config=config, use_safetensors=True, dtype=torch.float32,
                                                    output_loading_info=True, **options)
    except Exception as error:
        raise IntegrityError("transformers cannot load the folder", expected="config.json and safetensors that fit it",
                             found=f"{type(error).__name__}: {error}", where=folder) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise IntegrityError("the folder lacks weights, which would be random", expected=f"all of {names[0]}'s weights",
                             found=f"{len(missing)} missing: {', '.join(missing[:5])}", where=folder,
                             fix="correct architectures in config.json, or complete the weights")
    return Source(model.eval(), example_for(model))


def _from_function(name: str) -> Source:
    import torch

    module_name, _, function_name = name.partition(":")
    # As for "python -m": a script's folder is on the path of the command line only.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError("the function cannot be imported", expected="package.module:function", found=error, where=name,
                         fix="run the command where the module lies, or install it") from error
    except Exception as error:
        raise UsageError("the module fails when it is imported", found=f"{type(error).__name__}: {error}", where=name,
                         expected="package.module:function", fix=f"python -c 'import {module_name}'") from error
    try:
        result = function()
    except ModcompileError:
        raise
    except Exception as error:
        raise UsageError("the function fails", expected="one without arguments that returns (model, example_inputs)",
                         found=f"{type(error).__name__}: {error}", where=name,
                         fix=f"python -c 'import {module_name}; {module_name}.{function_name}()'") from error
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.nn.Module)):
        kinds = [type(item).__name__ for item in result] if isinstance(result, tuple) else type(result).__name__
        raise UsageError("the function returns something else", expected="(model, example_inputs)", found=kinds,
                         where=name)
    return Source(result[0].eval(), result[1])
