"""The causal decision: the model in which each row says for itself whether it enters, and no row waits for later ones.

Top-k over a sequence looks ahead, which nothing that generates can do. What a text costs a model in loss when it does
not is the quality that counts; this is how it is measured, a whole text at a time.
"""

__all__ = ["causal_model"]

from collections.abc import Sequence

from modcompile.errors import UsageError
from modcompile.model import MoDModel
from modcompile.pass_manager import PassManager
from modcompile.passes.decide_rows import DecideRows, predictor_path
from modcompile.training.predict import Predictors
from modcompile.training.threshold import QuantileThresholds


def causal_model(mod: MoDModel, by: Predictors | QuantileThresholds | None = None,
                 capacity_ratio: float | Sequence[float] = 1.0) -> MoDModel:
    """The model, on the same tensors, with a decision per row in the place of top-k.

    A row enters where its router's logit is above 0, which ``routing_losses`` teach; or above a threshold; or where a
    predictor's logit is above 0. How many do is in a trace: ``trace[path].taken()``.

    Args:
        mod: The routed model.
        by: What decides; None: the sign of the router's logit.
        capacity_ratio: The slots of a sequence. With 1.0 every row that wants to enters, and each output depends on the
            rows up to its own alone: what generation would give. With fewer, the rows of the lowest logits are dropped
            where too many want to: that looks ahead again, by as much as is dropped.

    Raises:
        UsageError: A model that routes sequences, or by the attention that rows receive, which later rows give;
            thresholds that were never updated.
        UnsupportedGraphError: A block whose empty slots cannot be hidden, with the reason.

    Example:
        >>> import torch, modcompile as mc
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> mod = mc.convert(torch.nn.TransformerEncoder(layer, 2).eval(), (torch.randn(2, 5, 8),))
        >>> with mc.trace_routing(causal := causal_model(mod)) as trace:
        ...     _ = causal(torch.randn(2, 16, 8))
        >>> trace["layers.1"].taken().float().mean()
        tensor(1.)
    """
    if mod.config.axis != "token":
        raise UsageError("sequences do not decide row by row", expected='axis="token"', where="causal_model",
                         found=f'axis="{mod.config.axis}"')
    if mod.config.router == "attention":
        raise UsageError("what attention a row receives is known when all later rows are there", where="causal_model",
                         expected='a router that sees the hidden state, router="linear" or "mlp"',
                         found='router="attention"')
    paths = tuple(mod.routers)
    thresholds = [0.0] * len(paths)
    if isinstance(by, QuantileThresholds):
        thresholds = by.values.tolist()
        if by.values.isnan().any():
            raise UsageError("a threshold was never updated", expected="QuantileThresholds.update on traces of a text",
                             found=", ".join(map(str, thresholds)), where="causal_model")
    made = mod.with_capacity(capacity_ratio)
    if isinstance(by, Predictors):
        for path, network in zip(paths, by.networks, strict=True):
            made.graph_module.add_submodule(predictor_path(path), network)
    manager = PassManager([DecideRows(paths, tuple(thresholds), isinstance(by, Predictors))])
    manager(made.graph_module)
    made.passes += manager.ran
    made._graph_changed()
    return made
