"""Eqs. (2)-(5) again, as slow plain loops over tokens, written from the paper alone; gradients by autograd."""

import torch


def entropy(logits):
    """Of the softmax of a list of scalars."""
    z = torch.stack(logits)
    log_p = z - torch.logsumexp(z, dim=0)
    return -(log_p.exp() * log_p).sum()


def heterogeneity(tokens, mask):
    """Eq. (2) of one image: tokens [patches, dim], mask [patches]."""
    masked = [i for i in range(len(mask)) if mask[i]]
    visible = [i for i in range(len(mask)) if not mask[i]]
    return torch.stack([entropy([tokens[i] @ tokens[j] for j in visible]) for i in masked]).mean()


def sparsity(tokens, mask, *, reduction="sum", include_self=True):
    """Eq. (3) of one image."""
    rows = [
        entropy([tokens[i] @ tokens[j] for j in range(len(mask)) if include_self or j != i])
        for i in range(len(mask))
        if not mask[i]
    ]
    return torch.stack(rows).sum() if reduction == "sum" else torch.stack(rows).mean()


def embedding(h_0, eps):
    """Eq. (4)."""
    return 1 / (h_0 + eps)


def ranking(h, direction):
    """Eq. (5) of one image."""
    sign = 1 if direction == "descending" else -1
    return torch.stack([torch.log(1 + torch.exp(sign * (h[i] - h[i - 1]))) for i in range(1, len(h))]).sum()


def similar(tokens, similarity):
    if similarity == "cosine":
        return tokens / tokens.norm(dim=-1, keepdim=True)
    return tokens / tokens.shape[-1] ** 0.25 if similarity == "scaled_dot" else tokens


def mto(layers, mask, config):
    """Weighted loss and terms of a batch: mean over images of each."""
    parts = []
    for image in range(len(mask)):
        tokens = [similar(each[image], config.similarity) for each in layers]
        h = [heterogeneity(each, mask[image]) for each in tokens]
        ranked = h if config.layers is None else [h[depth] for depth in config.layers]
        parts.append(
            (
                sparsity(tokens[0], mask[image], reduction=config.sparsity_reduction, include_self=config.include_self),
                embedding(h[0], config.eps),
                ranking(ranked, config.ranking_direction),
            )
        )
    terms = [torch.stack(each).mean() for each in zip(*parts, strict=True)]
    weights = (config.sparsity_weight, config.embedding_weight, config.ranking_weight)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True)), terms
