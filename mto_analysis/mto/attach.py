"""Masked token optimization in a foreign training loop: the losses, collected during the model's own forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mto_analysis.affinity import TokenSplit
from mto_analysis.errors import StackError
from mto_analysis.mto.collapse import collapse_of, warn_of
from mto_analysis.mto.losses import LayerProducts, MTOConfig, MTOTerms, combine_terms, layer_products
from mto_analysis.runtime.memory import Scratch
from mto_analysis.taps.forward import Forward, Stack
from mto_analysis.taps.hooks import Attached
from mto_analysis.taps.search import find_stacks, unwrap
from mto_analysis.taps.stacks import StackSpec, version_of

# In nats, mean or sum over rows: below this every visible token resembles only itself.
_DEAD = 1e-4


class _Losses(Forward):
    """Products of one stack's tokens in one forward, made in the hook, so that no list of tokens is kept.

    Inside reentrant activation checkpointing gradients are off in the hook; there the block's output object itself is
    kept, which gets its gradient when the checkpoint returns, and its products are made when the loss is asked for.
    """

    def __init__(self, *seen: Any, config: MTOConfig, scratch: Scratch) -> None:
        self.config, self.scratch = config, scratch
        self.splits: dict[int, TokenSplit] = {}
        self.products: dict[int, LayerProducts] = {}
        self.waiting: dict[int, Tensor] = {}
        self.versions: dict[int, int | None] = {}  # of tokens that are measured later
        self.taken: dict[int, Tensor] = {}  # measured with counts that are assumed; autograd keeps them anyway
        self.backward_ran: list[bool] = []  # filled by a hook of the graph, which must not keep this object alive
        self.freed = False
        super().__init__(*seen)

    def take(self, depth: int, tokens: Tensor) -> None:
        """Measure, or keep for later where gradients are off."""
        self.versions[depth] = version_of(tokens)
        if tokens.requires_grad and torch.is_grad_enabled():
            if self.assuming:
                self.taken[depth] = tokens
            self.measure(depth, tokens)
            if depth == self.spec.depth:
                tokens.register_hook(partial(_note, self.backward_ran))  # type: ignore[no-untyped-call]
        else:
            self.waiting[depth] = tokens

    def measure(self, depth: int, tokens: Tensor) -> None:
        """Products of one layer depth."""
        count = tokens.shape[1] - self.prefix
        if count not in self.splits:
            mask, numbers = self.mask_for(count)
            self.splits[count] = TokenSplit(mask, self.prefix, numbers=numbers, scratch=self.scratch)
        self.products[depth] = layer_products(self.images(tokens), self.splits[count], depth, self.config)

    def settle(self) -> bool:
        """Look at the mask itself where counts were assumed; if they are wrong, all is to be measured again."""
        right = super().settle()
        if not right:
            self.splits.clear()
            self.products.clear()
            self.waiting |= self.taken
        self.taken.clear()
        return right

    def look_for_graph(self) -> None:
        """Where the backward pass has freed the graph, forget everything: no loss can be had of it any more."""
        if self.backward_ran and not self.freed and self.products and _is_freed(self.products[self.spec.depth].masked):
            self.freed = True
            self.splits.clear()
            self.products.clear()
            self.taken.clear()
            self.waiting.clear()

    def finish(self, step: int) -> MTOTerms:
        """The terms of this stack in this forward."""
        for depth, tokens in sorted(self.waiting.items()):
            if not tokens.requires_grad:
                raise StackError(
                    f"tokens of {self.spec.name} at layer depth {depth} have no gradient: the model is frozen there, "
                    "or it checkpoints whole stages with use_reentrant=True; pass use_reentrant=False"
                )
            if version_of(tokens) != self.versions[depth]:
                raise StackError(
                    f"tokens of {self.spec.name} at layer depth {depth} were changed in place before they could be "
                    "measured; pass use_reentrant=False to torch.utils.checkpoint, or do without changes in place"
                )
            self.measure(depth, tokens)
        self.waiting.clear()
        depths = range(self.spec.depth + 1)
        missing = [depth for depth in depths if depth not in self.products]
        if missing:
            raise StackError(
                f"blocks {missing} of {self.spec.name} did not run; give stacks=... with those that do, or taps=..."
            )
        return combine_terms([self.products[depth] for depth in depths], self.config, step=step)


def _note(noted: list[bool], gradient: Tensor) -> None:
    noted.append(True)


def _is_freed(result: Tensor) -> bool:
    """Whether a backward pass has freed what the graph behind a result needs."""
    queue, seen = [result.grad_fn], set[Any]()
    while queue and len(seen) < 1000:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_"):
                try:
                    getattr(node, name)
                except RuntimeError:
                    return True
        queue += [each for each, _ in node.next_functions]
    return False


class MTO(Attached[_Losses]):
    """What :func:`attach_mto` gives: the loss of the last forwards, its terms for logging, and the way to detach.

    It can be pickled; of the model nothing is kept, so that the copy is not attached to anything.
    """

    def __init__(self, model: nn.Module, specs: Sequence[StackSpec], config: MTOConfig, check_every: int) -> None:
        for spec in specs:
            if config.layers and config.layers[-1] > spec.depth:
                raise ValueError(f"layers must be 0 to {spec.depth} for {spec.name}, got {config.layers}")
        self.config = config
        self._check_every = check_every
        self._last: dict[str, MTOTerms] = {}
        super().__init__(model, specs, partial(_Losses, config=config, scratch=Scratch()), may_assume=True)

    def loss(self) -> Tensor:
        """The weighted loss of all forwards with masked tokens since the last call, a float32 scalar.

        It is the mean over their images, and over stacks where there are several. Add it to the model's own loss
        before the backward pass through these forwards.

        Raises:
            StackError: If no forward with masked tokens was seen since the last call, a check of what was found
                failed, or the graph of a forward was freed by a backward pass before.
        """
        self._raise_failure()
        try:
            terms = {stack.spec.name: each for stack in self._stacks if (each := self._of_stack(stack)) is not None}
            if not terms:
                self._refuse_no_forward()
        finally:
            self.forget()
        self._last = {name: MTOTerms(*(value.detach() for value in each)) for name, each in terms.items()}
        if self._check_every and self.step % self._check_every == 0:
            for name, last in self._last.items():
                _warn_of_collapse(f"{name}, step {self.step}", last, self.config)
        self.step += 1
        weighted = [each.loss for each in terms.values()]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).mean()

    @property
    def pending(self) -> bool:
        """Whether a forward with masked tokens was seen since the last :meth:`loss`."""
        return any(stack.forwards for stack in self._stacks)

    def state_dict(self) -> dict[str, Any]:
        """The step and the configuration; nothing of the model."""
        return {"step": self.step, "config": asdict(self.config)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the step of a saved state.

        Raises:
            ValueError: If it was saved with another configuration.
        """
        saved = MTOConfig(**state["config"])
        if saved != self.config:
            raise ValueError(f"the state is of {saved}, this handle has {self.config}")
        self.step = int(state["step"])

    def __reduce__(self) -> tuple[Callable[..., MTO], tuple[Any, ...]]:
        """Without the model, and so without anything that is attached."""
        return _detached, (self.config, self._check_every, self.step)

    def _model_starts(self, module: nn.Module, *seen: Any) -> None:
        super()._model_starts(module, *seen)
        for stack in self._stacks:
            for forward in stack.forwards:
                forward.look_for_graph()

    def _of_stack(self, stack: Stack[_Losses]) -> MTOTerms | None:
        """Terms of one stack, as means over the images of its forwards."""
        for forward in stack.forwards:
            forward.settle()
            forward.look_for_graph()
            if forward.freed:
                raise StackError(
                    f"{stack.where}: backward() has freed the graph of a forward whose loss was not asked for: call "
                    "loss() before backward(), and forget() after forwards of which no loss is wanted"
                )
        forwards = [forward for forward in stack.forwards if forward.mask is not None]
        finished = [(forward.num_images, forward.finish(self.step)) for forward in forwards]
        if len(finished) < 2:
            return finished[0][1] if finished else None
        total = sum(count for count, _ in finished)
        scalars = [torch.stack(terms[:4]) * (count / total) for count, terms in finished]
        heterogeneity = torch.cat([terms.heterogeneity for _, terms in finished], dim=1)
        loss, sparsity, embedding, ranking = torch.stack(scalars).sum(dim=0).unbind()
        return MTOTerms(loss, sparsity, embedding, ranking, heterogeneity)

    def _refuse_no_forward(self) -> None:
        for stack in self._stacks:
            for token in stack.spec.mask_tokens:
                if not bool(torch.isfinite(token).all()):
                    raise StackError(f"{stack.spec.name}, step {self.step}: the mask token is not finite")
        seen = sum(stack.unmasked for stack in self._stacks)
        raise StackError(
            f"no forward with masked tokens since the last loss(), {', '.join(stack.where for stack in self._stacks)}; "
            f"{seen} without any were seen since attach_mto. The model was in eval mode or without gradients, "
            "no patch was masked, dropout changed the mask token, its position is unknown (pass "
            "stacks=[StackSpec(..., position=...)]), torch.compile had run before attach_mto, "
            "nn.DataParallel runs copies of the model, or detach() was called"
        )

    @property
    def terms(self) -> dict[str, float]:
        """Terms of the last loss, for logging; reading them waits for the device.

        Keys are ``loss``, ``sparsity``, ``embedding``, ``ranking`` (before weights), ``heterogeneity_0`` ... and, after
        the backward pass, ``mask_token_grad_norm``; with several stacks each key starts with the stack's name.
        """
        values: dict[str, float] = {}
        for stack in self._stacks:
            if stack.spec.name not in self._last:
                continue
            last, start = self._last[stack.spec.name], self._key_prefix(stack)
            for term in ("loss", "sparsity", "embedding", "ranking"):
                values[start + term] = getattr(last, term).item()
            for depth, h in enumerate(last.heterogeneity.mean(dim=1).tolist()):
                values[f"{start}heterogeneity_{depth}"] = h
            gradients = [token.grad.norm() for token in stack.spec.mask_tokens if token.grad is not None]
            if gradients:
                values[f"{start}mask_token_grad_norm"] = torch.stack(gradients).norm().item()
        return values


def attach_mto(
    model: nn.Module,
    config: MTOConfig | None = None,
    *,
    stacks: Sequence[StackSpec] | None = None,
    check_every: int = 100,
) -> MTO:
    """Attach masked token optimization to an unmodified model; its masked tokens are found by structure.

    Found are a learned mask token, lists of blocks and positions of its width in any submodule, by structure and never
    by class; what is found is verified in forwards, and what is not needs ``stacks``. Compared with plain loops in the
    tests: facebookresearch/mae, microsoft/SimMIM (ViT and Swin), LightDXY/BootMAE (both decoders), TencentARC/ConMIM
    and BEiT, every vision class of Hugging Face with a mask token, lightly's MAE and SimMIM parts, and our own.

    Keep the handle; the model does not. Attach after copies of the model (EMA) were made and before ``torch.compile``
    runs for the first time. In evaluation mode and without gradients the hooks do nothing.

    Args:
        model: An instance, wrapped in DistributedDataParallel or torch.compile or not.
        config: Settings; ``MTOConfig()`` by default.
        stacks: Where masked tokens live, for models of another structure.
        check_every: Look for collapse and terms that are not finite every so many steps; 0 for never.

    Raises:
        ValueError: If no structure fits, or the model is wrapped in nn.DataParallel.

    Example:
        >>> from mto_analysis.demo import DEMO_CHECKPOINTS, demo_batches
        >>> from mto_analysis import load_checkpoint, mask_keys, reconstruction_loss
        >>> model = load_checkpoint(DEMO_CHECKPOINTS["SimMIM"]).train()
        >>> mto = attach_mto(model)
        >>> batch = next(demo_batches(model.info, limit=4))
        >>> mask = model.info.mask_rule.sample(mask_keys(batch.names), model.info.grid, model.info.patch_size)
        >>> loss = reconstruction_loss(model(batch.images, mask), batch.images, mask, model.info.patch_size).mean()
        >>> loss = loss + mto.loss()
        >>> loss.backward()
        >>> sorted(mto.terms)[:3]
        ['embedding', 'heterogeneity_0', 'heterogeneity_1']
        >>> mto.detach()
    """
    inner = unwrap(model)
    return MTO(inner, stacks or find_stacks(inner), config or MTOConfig(), check_every)


def with_loss(output: Any, extra: Tensor) -> Any:
    """What a model or a training step returned, with more loss: a loss, a tuple that starts with one, or a mapping."""
    if isinstance(output, Tensor) and not output.ndim:
        return output + extra
    loss = output.get("loss") if isinstance(output, Mapping) else (output[0] if isinstance(output, tuple) else None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise StackError(f"the output ({type(output).__name__}) has no loss to add to; pass labels or targets")
    if isinstance(output, tuple):
        return (loss + extra, *output[1:])
    output["loss"] = loss + extra
    return output


def _detached(config: MTOConfig, check_every: int, step: int) -> MTO:
    handle = MTO(nn.Identity(), (), config, check_every)
    handle.step = step
    return handle


def _warn_of_collapse(where: str, last: MTOTerms, config: MTOConfig) -> None:
    h = last.heterogeneity.abs().amax()  # not finite where any is not
    names = ("sparsity", "embedding", "ranking", "heterogeneity")
    values = dict(zip(names, torch.stack([last.sparsity, last.embedding, last.ranking, h]).tolist(), strict=True))
    for name in names[:-1]:
        if not math.isfinite(values[name]):
            warn_of(f"{where}: {name} is not finite")
    if words := collapse_of([values["heterogeneity"]]):
        warn_of(f"{where}: {words}")
    if config.sparsity_weight > 0 and values["sparsity"] < _DEAD:
        warn_of(f"{where}: L_spa is dead, each visible token resembles only itself")
