"""Teacher and student for the refinement: one model in full precision, one with ternary linears.

Both are transformers' own models, filled from the checkpoint tensor by tensor. In the student each
ternary linear is a :class:`TernaryLinear` and each norm a :class:`ScaledNorm`; whatever is not
trained shares the teacher's memory.

What is trained is relative, so that one step size fits all: alpha = alpha_0 (1 + a),
mu = mu_0 + alpha_0 b, a norm's weight = w_0 (1 + c), an embedding = e_0 + rms(e_0) d, with a, b,
c and d from 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pt2_core.errors import PT2Error
from quantize.model.latent import Latent, initial_latent

Read = Callable[[str, tuple[int, ...]], Tensor]


class TernaryProduct(torch.autograd.Function):
    """``x[..., perm] @ (alpha T + mu)^T``: the weight is made anew in both passes, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, mu: Tensor, layer: TernaryLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, alpha, mu)
        return layer.gather(x) @ layer.weight(alpha, mu, x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, alpha, mu = ctx.saved_tensors
        layer: TernaryLinear = ctx.layer
        dx = None
        if ctx.needs_input_grad[0]:
            dx = layer.scatter(dy @ layer.weight(alpha, mu, dy.dtype))
        columns = layer.gather(x).flatten(0, -2)
        dw = (dy.flatten(0, -2).T @ columns).float().view(*alpha.shape, -1)
        d_alpha = (dw * layer.codes().view_as(dw)).sum(dim=-1)
        d_mu = dw.sum(dim=-1)
        if layer.latent is not None:
            layer.latent.add_gradient(dw.mul_(alpha[..., None]).view_as(layer.latent.z))
        return dx, d_alpha, d_mu, None


class TernaryLinear(nn.Module):
    """A linear whose weight is ``alpha * T + mu`` per row and block, columns in an order.

    Args:
        t: int8 ``[rows, cols]``, in the quantised order.
        alpha, mu: float ``[rows, blocks]``.
        perm: int64 ``[cols]``; quantised column j reads input ``perm[j]``.
        bias: ``[rows]`` or None.
        latent: the codes' latents where they are trained; ``t`` is then not kept.
        levels: how many values T may take.
    """

    def __init__(
        self, t: Tensor, alpha: Tensor, mu: Tensor, perm: Tensor, bias: Tensor | None = None,
        latent: Latent | None = None, levels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.levels = levels
        self.latent = latent
        self.t = None if latent is not None else t
        self.alpha_0, self.mu_0 = alpha.float(), mu.float()
        self.a = nn.Parameter(torch.zeros_like(self.alpha_0))
        self.b = nn.Parameter(torch.zeros_like(self.alpha_0))
        natural = bool((perm == torch.arange(perm.shape[0], device=perm.device)).all())
        self.perm = None if natural else perm
        self.inverse = None if natural else torch.argsort(perm)
        self.bias = bias

    def grid(self) -> tuple[Tensor, Tensor]:
        """alpha and mu as they are now, float32 ``[rows, blocks]``."""
        return torch.addcmul(self.alpha_0, self.alpha_0, self.a), torch.addcmul(
            self.mu_0, self.alpha_0, self.b
        )

    def codes(self) -> Tensor:
        """T as it is now (between codes in a soft staircase), float32 ``[rows, cols]``."""
        if self.latent is not None:
            return self.latent.codes()
        assert self.t is not None
        return self.t.float()

    def weight(self, alpha: Tensor, mu: Tensor, dtype: torch.dtype) -> Tensor:
        """``alpha * T + mu``, ``[rows, cols]`` in the quantised order."""
        codes = self.codes().view(*alpha.shape, -1)
        dense = torch.addcmul(mu[..., None], alpha[..., None], codes)
        return dense.to(dtype).view(alpha.shape[0], -1)

    def gather(self, x: Tensor) -> Tensor:
        """Inputs in the quantised order."""
        return x if self.perm is None else x.index_select(-1, self.perm)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        return x if self.inverse is None else x.index_select(-1, self.inverse)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., cols]`` -> ``[..., rows]``."""
        y = TernaryProduct.apply(x, *self.grid(), self)
        return y if self.bias is None else y + self.bias


class ScaledNorm(nn.Module):
    """RMSNorm whose weight is ``w_0 (1 + c)``."""

    def __init__(self, weight: Tensor, eps: float, trained: bool) -> None:
        super().__init__()
        self.weight_0, self.eps = weight.float(), eps
        self.c = nn.Parameter(torch.zeros_like(self.weight_0), requires_grad=trained)

    def weight(self) -> Tensor:
        """float32 ``[width]``."""
        return torch.addcmul(self.weight_0, self.weight_0, self.c)

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weight().to(x.dtype), self.eps)


class Table(nn.Module):
    """Embeddings or head ``e_0 + rms(e_0) d``; without ``d`` it costs nothing."""

    def __init__(self, weight: Tensor, trained: bool) -> None:
        super().__init__()
        self.weight_0 = weight
        self.scale = float(weight.float().square().mean().sqrt())
        self.d = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32)) if trained else None

    def forward(self, dtype: torch.dtype) -> Tensor:
        """``[vocab, hidden]``."""
        if self.d is None:
            return self.weight_0.to(dtype)
        return self.weight_0.float().add(self.d, alpha=self.scale).to(dtype)


@dataclass
class Network:
    """A body (``[n, len]`` token ids to final states) with its embeddings and head."""

    body: nn.Module
    embeddings: Table
    head: Table
    dtype: torch.dtype

    def states(self, tokens: Tensor) -> Tensor:
        """The states that the head reads, ``[n, len, hidden]``."""
        x = functional.embedding(tokens, self.embeddings(self.dtype))
        return self.body(inputs_embeds=x, use_cache=False).last_hidden_state

    def head_weight(self) -> Tensor:
        """``[vocab, hidden]`` in the forward dtype."""
        return self.head(self.dtype)

    def modules(self, kind: type) -> Iterator[tuple[str, Any]]:
        """(name in the checkpoint, module) of each module of a kind."""
        for name, module in self.body.named_modules():
            if isinstance(module, kind):
                yield f"model.{name}", module


# What a model multiplies its logits with, or bends them by: not in what is trained.
_ON_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def check_trainable(model: Any) -> None:
    """Refuse a class that the refinement does not rebuild: it is for Llama's shape of model.

    Args:
        model: transformers' causal LM; only its modules count.

    Raises:
        PT2Error: experts, transposed linears, other norms than RMSNorm, or logits that are scaled.
    """
    problem = _problem(model)
    if problem:
        raise PT2Error(
            f"{type(model).__name__} {problem}: it cannot be trained or write text here; quantise "
            "it with --recipe best"
        )


def _problem(model: Any) -> str | None:
    body: Any = getattr(model, "model", None)
    wanted = ("embed_tokens", "layers", "norm", "rotary_emb")
    if not all(hasattr(body, name) for name in wanted):
        return f"has not the parts {', '.join(wanted)}"
    if type(body.embed_tokens) is not nn.Embedding:
        return "scales its embeddings"
    if any(getattr(model.config, n, None) not in (None, 1.0) for n in _ON_LOGITS):
        return "scales its logits"
    for module in model.modules():
        if any(p.dim() > 2 for p in module.parameters(recurse=False)):
            return "has experts or convolutions"
        if "Norm" in type(module).__name__ and not _is_plain_rms(module):
            return f"has norms of the kind {type(module).__name__}"
    return None


def _is_plain_rms(module: nn.Module) -> bool:
    """Whether a norm is what :class:`ScaledNorm` computes."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    twin, g = deepcopy(module), torch.Generator().manual_seed(0)
    twin.weight = nn.Parameter(torch.rand(weight.shape, generator=g), requires_grad=False)
    x = torch.randn(2, weight.shape[0], generator=g)
    return torch.allclose(
        twin(x), functional.rms_norm(x, x.shape[-1:], twin.weight, eps), atol=1e-5
    )


def build_teacher(
    config: Any, read: Read, device: str, dtype: torch.dtype, *, tied: bool
) -> Network:
    """The full-precision model.

    Args:
        read: gives a tensor of the checkpoint by name and shape.
        tied: whether the embeddings' table is the head's too (``Checkpoint.tied``).
    """
    shell = _shell(config)

    def fill(name: str, like: Tensor) -> Tensor:
        return read(name, tuple(like.shape)).to(device, dtype)

    body = shell.model
    for name, parameter in list(body.named_parameters()):
        if name != "embed_tokens.weight":
            _set(body, name, fill(f"model.{name}", parameter))
    table = Table(fill("model.embed_tokens.weight", body.embed_tokens.weight), False)
    body.embed_tokens = None
    _rotary(body, config, device)
    head = table if tied else Table(fill("lm_head.weight", shell.lm_head.weight), False)
    return Network(body.eval(), table, head, dtype)


def build_student(
    config: Any,
    teacher: Network,
    matrices: Iterable[tuple[str, Callable[[Tensor, Tensor | None], TernaryLinear]]],
    *,
    norms: bool,
    embeddings: bool,
    checkpointing: bool,
) -> Network:
    """A copy of the teacher with its ternary linears in place.

    Args:
        matrices: (module name, what makes the linear of the teacher's weight and bias).
        norms, embeddings: whether they are trained. The head is with the embeddings.
        checkpointing: keep only each block's input for the backward pass and run the block again.
    """
    body = _shell(config).model
    body.embed_tokens = None
    for name, value in teacher.body.named_parameters():
        _set(body, name, value.data)
    _rotary(body, config, next(iter(teacher.body.parameters())).device)
    for name, make in matrices:
        module = name.removeprefix("model.")
        linear: Any = teacher.body.get_submodule(module)
        _replace(body, module, make(linear.weight.data, getattr(linear, "bias", None)))
    modules: list[tuple[str, Any]] = list(body.named_modules())
    for name, module in modules:
        if type(module).__name__.endswith("RMSNorm"):
            eps = float(module.variance_epsilon)
            _replace(body, name, ScaledNorm(module.weight.data, eps, norms))
    if checkpointing:
        for layer in body.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    table, head = teacher.embeddings, teacher.head
    if embeddings:
        table = Table(table.weight_0, True)
        head = table if teacher.head is teacher.embeddings else Table(head.weight_0, True)
    return Network(body.eval(), table, head, teacher.dtype)


def trainable(student: Network) -> tuple[list[Tensor], list[Tensor], list[Latent]]:
    """The student's small parameters (a, b, c), its tables (d), and its latents."""
    grids: list[Tensor] = [p for p in student.body.parameters() if p.requires_grad]
    tables = [student.embeddings.d]
    if student.head is not student.embeddings:
        tables.append(student.head.d)
    latents: list[Latent] = [m.latent for _, m in student.modules(TernaryLinear) if m.latent]
    return grids, [t for t in tables if t is not None], latents


def ternary_maker(
    t: Tensor,
    alpha: Tensor,
    mu: Tensor,
    perm: Tensor,
    *,
    moving: bool,
    per_weight: bool = False,
    levels: int = 3,
) -> Callable[[Tensor, Tensor | None], TernaryLinear]:
    """What makes a :class:`TernaryLinear` out of a quantised matrix and the teacher's linear.

    Args:
        t: int8 ``[rows, cols]``; alpha, mu: float ``[rows, blocks]``; perm: int64 ``[cols]``.
        moving: give its codes latents.
        per_weight: keep Adam's second moment for each weight, not for each block.
        levels: how many values T may take.
    """

    def make(weight: Tensor, bias: Tensor | None) -> TernaryLinear:
        device = weight.device
        codes, scale, offset, order = (x.to(device) for x in (t, alpha.float(), mu.float(), perm))
        latent = None
        if moving:
            z = initial_latent(weight.float()[:, order], codes, scale, offset)
            latent = Latent(z, scale.shape[1], per_weight=per_weight, levels=levels)
        return TernaryLinear(codes, scale, offset, order, bias, latent, levels)

    return make


def _shell(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _rotary(body: Any, config: Any, device: Any) -> None:
    module = importlib.import_module(type(body).__module__)
    name = type(body.rotary_emb).__name__
    body.rotary_emb = getattr(module, name)(config).to(device)


def _replace(body: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(owner), leaf, module)


def _set(body: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
