"""What examples/tasks.py puts on an encoder: a head for each kind of task, with its loss and its scores."""

import statistics
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from modcompile.tasks import EncodedBatch, Task, accuracy, answer_spans, exact_match, overlap, spearman
from modcompile.training import logits_loss

# B batch  S rows  D model dim  C classes


class Classifier(nn.Module):
    """Classes of texts or of pairs of them, from the mean of the hidden states of valid tokens."""

    def __init__(self, encoder: nn.Module, labels: Sequence[str]):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, len(labels))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, C]."""
        return self.head(mean_valid(self.encoder(**inputs).last_hidden_state, inputs["attention_mask"]))

    @staticmethod
    def loss(logits: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """Cross entropy."""
        return F.cross_entropy(logits.float(), batch.target)

    @staticmethod
    def distance(logits: torch.Tensor, expected: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """KL divergence."""
        return logits_loss(logits, expected)

    @staticmethod
    def scores(outputs: list[torch.Tensor], batches: list[EncodedBatch], task: Task) -> dict[str, float]:
        """Accuracy."""
        return {"accuracy": accuracy(torch.cat(outputs).argmax(-1), torch.cat([batch.target for batch in batches]))}


class SpanFinder(nn.Module):
    """The first and the last token of an answer."""

    def __init__(self, encoder: nn.Module, labels: Sequence[str]):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, 2]."""
        return self.head(self.encoder(**inputs).last_hidden_state)

    @staticmethod
    def loss(logits: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """Cross entropy of both, over valid tokens; the mean over answers that were not cut off."""
        wrong = F.cross_entropy(at_valid(logits, batch).flatten(0, 1), batch.target.flatten(), reduction="sum")
        return wrong / (batch.target >= 0).sum().clamp(min=1)

    @staticmethod
    def distance(logits: torch.Tensor, expected: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """KL divergence over the tokens."""
        return logits_loss(at_valid(logits, batch), at_valid(expected, batch))

    @staticmethod
    def scores(outputs: list[torch.Tensor], batches: list[EncodedBatch], task: Task) -> dict[str, float]:
        """Exact match and F1."""
        found = {index: text for logits, batch in zip(outputs, batches, strict=True)
                 for index, text in zip(batch.indices, answer_spans(logits, batch, task.test), strict=True)}
        right = {index: [answer.text for answer in task.test[index].answers] for index in found}
        return {"exact match": statistics.fmean(exact_match(found[i], right[i]) for i in found),
                "F1": statistics.fmean(overlap(found[i], right[i]) for i in found)}  # fmt: skip


class Embedder(nn.Module):
    """The direction of the mean hidden state; how alike two texts are is the cosine."""

    def __init__(self, encoder: nn.Module, labels: Sequence[str]):
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Unit vectors [2 B, D]."""
        return F.normalize(mean_valid(self.encoder(**inputs).last_hidden_state, inputs["attention_mask"]), dim=-1)

    @staticmethod
    def cosines(vectors: torch.Tensor) -> torch.Tensor:
        """Of each pair, [B]."""
        return (vectors[::2].float() * vectors[1::2].float()).sum(-1)

    @staticmethod
    def loss(vectors: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """Squared error of the cosines."""
        return F.mse_loss(Embedder.cosines(vectors), batch.target)

    @staticmethod
    def distance(vectors: torch.Tensor, expected: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
        """1 - cosine between the two models' vectors."""
        return (1 - (vectors.float() * expected.float()).sum(-1)).mean()

    @staticmethod
    def scores(outputs: list[torch.Tensor], batches: list[EncodedBatch], task: Task) -> dict[str, float]:
        """Rank correlation of cosines and ratings."""
        return {"Spearman": spearman(torch.cat([Embedder.cosines(vectors) for vectors in outputs]),
                                     torch.cat([batch.target for batch in batches]))}  # fmt: skip


def mean_valid(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean [B, D] of valid rows of hidden states [B, S, D]."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def at_valid(logits: torch.Tensor, batch: EncodedBatch) -> torch.Tensor:
    """Logits over the tokens, [B, 2, S], which no padding takes part in."""
    padding = batch.inputs["attention_mask"][:, None] == 0  # [B, 1, S]
    return logits.float().transpose(1, 2).masked_fill(padding, torch.finfo(torch.float32).min / 4)
