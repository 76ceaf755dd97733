"""Orders of the columns: which ones share a block, and which block comes first.

An order is an int64 permutation ``perm`` of the columns: place j of the quantised matrix holds
column ``perm[j]`` of the source. ``hessian_diag`` is float ``[cols]``, the mean square of each
input.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def random_order(cols: int, seed: int, name: str) -> Tensor:
    """A random order that depends on the seed and the matrix's name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(cols, generator=generator)


def descending(importance: Tensor) -> Tensor:
    """The order of falling importance; equal ones keep their place. On the CPU."""
    return torch.argsort(importance.cpu(), descending=True, stable=True)


def within_heads(importance: Tensor, head_dim: int, queries_per_kv: int) -> Tensor:
    """Order o_proj's columns by falling importance, each inside its own attention head.

    Query heads that share a key-value head share its rows of v_proj, so they get one order, by
    the sum of their importances.

    Args:
        importance: ``[heads * head_dim]``.
        head_dim: columns per head.
        queries_per_kv: query heads that share a key-value head.
    """
    grouped = importance.cpu().reshape(-1, queries_per_kv, head_dim)  # [kv heads, group, head_dim]
    inner = torch.argsort(grouped.sum(dim=1), dim=1, descending=True, stable=True)
    inner = inner[:, None, :].expand(-1, queries_per_kv, -1).reshape(-1, head_dim)
    start = torch.arange(inner.shape[0])[:, None] * head_dim
    return (start + inner).reshape(-1)


def most_similar(w: Tensor, count: int) -> Tensor:
    """SSR's choice of the next block (eq. 16).

    Args:
        w: ``[rows, remaining]``, the columns that are not yet quantised, as compensated so far.
        count: the block size.

    Returns:
        An order of the remaining columns, int64 ``[remaining]``: first the ``count`` columns most
        similar (cosine) to the mean column, the most similar first; then the rest in their order.
    """
    mean = w.mean(dim=1)
    norms = torch.linalg.vector_norm(w, dim=0) * torch.linalg.vector_norm(mean)
    # A dead column has no direction; it goes last.
    cosine = torch.where(norms > 0, (mean @ w) / norms, -2.0)
    chosen = torch.argsort(cosine, descending=True, stable=True)[:count]
    rest = torch.ones(w.shape[1], dtype=torch.bool, device=w.device)
    rest[chosen] = False
    return torch.cat([chosen, rest.nonzero()[:, 0]])


def inverse(perm: Tensor) -> Tensor:
    """The permutation that undoes ``perm``: ``w[:, perm][:, inverse(perm)] == w``."""
    result = torch.empty_like(perm)
    result[perm] = torch.arange(perm.shape[0], device=perm.device, dtype=perm.dtype)
    return result
