"""Other methods against bad steps, as callbacks: pip install -e '.[peers]'.

Each acts before every optimizer step, and saves its state in the Trainer's checkpoints. Under mixed
precision, gradients are unscaled by then, but a GradScaler has not yet skipped a step whose
gradients overflowed. So norms that are not finite are left out of running means and quantiles.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from .extras import imported

PACKAGES = {"zclip": "zclip", "autoclip": "autoclip", "autoclip10": "autoclip", "agc": "timm"}
"""Packages that methods need, by method."""


class ZClipping(pl.Callback):
    """Clip the gradient's norm if it lies too far above its running mean.

    It uses the package zclip 1.0. That package's callback does not save its state in checkpoints,
    and needs the package `lightning`. Unlike the package, this callback leaves norms that are not
    finite out of mean and variance, which would otherwise stay infinite or NaN.

    Args:
        alpha: decay of the norm's running mean and variance.
        z_thresh: standard deviations above the mean at which a norm is clipped.
        max_grad_norm: the largest norm allowed, whatever the mean.
        warmup_steps: number of first steps whose norms give the first mean and variance.

    Reference:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training" (2025).
    """

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | None = 1.0,
        warmup_steps: int = 25,
    ) -> None:
        self.clipper = imported("zclip", "peers").ZClip(
            alpha=alpha, z_thresh=z_thresh, max_grad_norm=max_grad_norm, warmup_steps=warmup_steps
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip, and update mean and variance if the norm is finite."""
        before = copy.deepcopy(self.state_dict())
        if not math.isfinite(self.clipper.step(pl_module)):
            self.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """The running mean and variance, or the warm-up's norms so far."""
        names = ("buffer", "initialized", "mean", "var")
        return {name: getattr(self.clipper, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        vars(self.clipper).update(state_dict)


class AutoClipping(pl.Callback):
    """Clip each parameter's gradient norm to a quantile of its earlier norms.

    It uses the package autoclip 0.2. Unlike the package, this callback leaves norms that are not
    finite out of the history. Otherwise the quantile, and then every gradient, would be NaN.

    Args:
        quantile: quantile of the earlier norms.
        history_length: number of norms kept.
        global_threshold: clip the norm over all parameters, as in the paper, and not the norm of
            each parameter.

    Reference:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
        MLSP 2020.
    """

    def __init__(
        self, quantile: float = 0.9, history_length: int = 1000, global_threshold: bool = False
    ) -> None:
        self.clipper_class = imported("autoclip.torch", "peers").QuantileClip
        self.arguments = {
            "quantile": quantile,
            "history_length": history_length,
            "global_threshold": global_threshold,
        }
        self.clipper: Any = None
        self.restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the clipper, which needs the parameters."""
        self.clipper = self.clipper_class(pl_module.parameters(), **self.arguments)
        if self.restored is not None:
            self.clipper.load_state_dict(self.restored)
            # The package leaves the norms over all parameters on the device they were loaded to.
            device = next(pl_module.parameters()).device
            for key, history in self._histories().items():
                self._put_back(key, history.to(device))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip, and add the norms that are finite to the history."""
        before = self._histories()
        self.clipper.step()
        after = self._histories()
        last = [history[-1] for history in after.values()]
        # One read from the device, instead of one for each parameter.
        finite = torch.stack(last).isfinite().tolist() if last else []
        for key, is_finite in zip(after, finite, strict=True):
            if not is_finite:
                self._put_back(key, before.get(key))

    def state_dict(self) -> dict[str, Any]:
        """The history of norms."""
        return {"clipper": None if self.clipper is None else self.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.restored = state_dict["clipper"]

    def _histories(self) -> dict[Any, Tensor]:
        """The norms of each parameter, or those over all parameters, as the package keeps them."""
        state = self.clipper.state.items()
        return {key: each["history"] if isinstance(each, dict) else each for key, each in state}

    def _put_back(self, key: Any, history: Tensor | None) -> None:
        if history is None:
            del self.clipper.state[key]
        elif isinstance(self.clipper.state[key], dict):
            self.clipper.state[key]["history"] = history
        else:
            self.clipper.state[key] = history


class AdaptiveGradientClipping(pl.Callback):
    """Clip the gradient of each output unit's weights to a fraction of the norm of the weights.

    It uses `adaptive_clip_grad` of the package timm 1.0.

    Args:
        clip_factor: the fraction.
        eps: least norm of weights; smaller norms are replaced by it.
        exclude_head: leave out the last two parameters, which are the output layer's.

    Reference:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization",
        ICML 2021.
    """

    def __init__(
        self, clip_factor: float = 0.01, eps: float = 1e-3, exclude_head: bool = True
    ) -> None:
        self.clip = imported("timm.utils.agc", "peers").adaptive_clip_grad
        self.clip_factor = clip_factor
        self.eps = eps
        self.exclude_head = exclude_head

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        parameters = list(pl_module.parameters())[: -2 if self.exclude_head else None]
        self.clip(parameters, clip_factor=self.clip_factor, eps=self.eps)


class StepSkipping(pl.Callback):
    """Skip a step whose loss or gradient norm lies too far above those of the last steps.

    This is the rule of OLMo-core's `SkipStepOptimizer`, which works only with that framework's
    optimizers. A skipped step changes neither parameters nor optimizer. Its loss and norm still
    enter the window if they are finite, as in OLMo-core after version 3.0.

    Args:
        window: number of steps for mean and standard deviation. Before step `window // 2`, counted
            from 1, nothing is skipped.
        num_stddev: standard deviations above the mean at which a step is skipped.

    Attributes:
        skipped: number of steps that were skipped.

    Reference:
        `olmo_core/optim/skip_step_optimizer.py` of https://github.com/allenai/OLMo-core.
    """

    def __init__(self, window: int = 128, num_stddev: float = 6.0) -> None:
        self.num_stddev = num_stddev
        self.losses: deque[Tensor] = deque(maxlen=window + 1)
        self.norms: deque[Tensor] = deque(maxlen=window + 1)
        self.fewest = max(2, window // 2)
        self.skipped = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move restored losses and norms to the module's device."""
        for window in (self.losses, self.norms):
            moved = [each.to(pl_module.device) for each in window]
            window.clear()
            window.extend(moved)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Note the loss, without the factor of a GradScaler."""
        scale = 1.0 if trainer.scaler is None else trainer.scaler.get_scale()
        self.losses.append(loss.detach() / scale)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the gradient's norm, and remove the gradients if the step is to be skipped."""
        gradients = [each.grad for each in pl_module.parameters() if each.grad is not None]
        self.norms.append(torch.stack([each.norm() for each in gradients]).norm())
        if len(self.losses) < self.fewest:
            return
        if self._is_far_above(self.losses) or self._is_far_above(self.norms):
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The losses and norms in the window, and the number of skipped steps."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.losses.extend(state_dict["losses"])
        self.norms.extend(state_dict["norms"])
        self.skipped = state_dict["skipped"]

    def _is_far_above(self, values: deque[Tensor]) -> bool:
        """Whether the last value is too far above the values before it, or is not finite."""
        *before, last = values
        known = torch.stack(before)
        known = known[known.isfinite()]
        if len(known) < 2:  # there is no standard deviation
            return not bool(last.isfinite())
        return not bool(last <= known.mean() + self.num_stddev * known.std())
