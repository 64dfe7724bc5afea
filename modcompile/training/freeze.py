"""Freezing recipes: which parameters of a routed model train."""

__all__ = ["freeze"]

from typing import Literal

from modcompile.errors import UsageError
from modcompile.model import MoDModel


def freeze(mod: MoDModel, train: Literal["all", "routers", "lora"]) -> list[str]:
    """Sets ``requires_grad`` of every floating-point parameter.

    Args:
        mod: The model.
        train: "all"; "routers" only; or "lora", the routers and the adapters that ``peft`` put into the source before
            the conversion: ``convert(peft.inject_adapter_in_model(peft.LoraConfig(...), model), inputs, config)``.

    Returns:
        The names of the parameters that train.

    Raises:
        UsageError: "lora" for a model without adapters; another word; nothing would train.

    Example:
        >>> import torch, modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),))
        >>> freeze(mod, "routers")
        ['router.layers.1.weight', 'router.layers.1.bias']
    """
    if train not in ("all", "routers", "lora"):
        raise UsageError("there is no such recipe", expected="all, routers or lora", found=train, where="freeze")
    routers = {id(parameter) for router in mod.routers.values() for parameter in router.parameters()}
    # peft's names: lora_A, lora_B, lora_embedding_A, lora_magnitude_vector.
    adapters = {name for name, _ in mod.named_parameters() if any(part.startswith("lora_") for part in name.split("."))}
    if train == "lora" and not adapters:
        raise UsageError("the model has no adapters", expected="parameters named lora_*", found="none", where="freeze",
                         fix='pip install "modcompile[peft]", and convert what peft.inject_adapter_in_model gives')
    trained = []
    for name, parameter in mod.named_parameters():
        chosen = train == "all" or id(parameter) in routers or (train == "lora" and name in adapters)
        if parameter.is_floating_point():
            parameter.requires_grad_(chosen)
            trained += [name] if chosen else []
    if not trained:
        raise UsageError("nothing would train", expected="routers with parameters",
                         found=f'router="{mod.config.router}"', where="freeze")
    return trained
