"""The grid's trainings: every combination of the settings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import yaml

from .command_line import experiment_config, from_anywhere, method_configs
from .training import Run

PAPER_METHODS = ("none", "alrc2", "alrc3", "alrc4")
PAPER_BATCH_SIZES = (1, 4, 16, 64)
UNSTABLE_RATES = {"adam": (0.0001, 0.002), "sgd": (0.0001, 0.003)}
LAST_STEPS = 5000


def expand(
    *,
    experiments: Sequence[str],
    methods: Sequence[str],
    losses: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    optimizers: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    outlier_kinds: Sequence[str] | None = None,
    outlier_fractions: Sequence[float] | None = None,
    seeds: Iterable[int],
    steps: int | None = None,
    last_steps: int | None = None,
    **common: Any,
) -> Iterator[Run]:
    """All combinations, as `grid` describes them; trainings of one seed are neighbours."""
    for method in methods:
        method_configs(method)
    # Nodes of a cluster may work in another directory.
    methods = [from_anywhere(method) for method in methods]
    for seed, experiment in itertools.product(seeds, experiments):
        config = yaml.safe_load(experiment_config(experiment).read_text())
        trainer, model, images = config["trainer"], config["model"], config["data"]
        own_sizes = PAPER_BATCH_SIZES if experiment in ("squared", "quartic") else None
        for loss, batch_size, (optimizer, rate), (kind, fraction), method in itertools.product(
            losses or [model["loss"]],
            batch_sizes or own_sizes or [images["batch_size"]],
            rates(experiment, model, optimizers, learning_rates),
            outliers(images, outlier_kinds, outlier_fractions),
            methods,
        ):
            run_steps = trainer["max_steps"] if steps is None else steps
            yield Run(
                experiment=experiment,
                method=method,
                loss=loss,
                batch_size=batch_size,
                optimizer=optimizer,
                learning_rate=rate,
                outlier_kind=kind,
                outlier_fraction=fraction,
                seed=seed,
                steps=run_steps,
                last_steps=last_steps or min(LAST_STEPS, max(1, round(0.4 * run_steps))),
                **common,
            )


def rates(
    experiment: str,
    model: dict[str, Any],
    optimizers: Sequence[str] | None,
    learning_rates: Sequence[float] | None,
) -> list[tuple[str, float]]:
    """The pairs of optimizer and learning rate of an experiment."""
    unstable = experiment == "unstable"
    names = optimizers or (list(UNSTABLE_RATES) if unstable else [model["optimizer"]])
    return [
        (name, rate)
        for name in names
        for rate in learning_rates
        or (UNSTABLE_RATES[name] if unstable else [model["learning_rate"]])
    ]


def outliers(
    images: dict[str, Any], kinds: Sequence[str] | None, fractions: Sequence[float] | None
) -> list[tuple[str | None, float]]:
    """The pairs of kind and fraction of outliers, with a single pair for no outliers."""
    pairs: list[tuple[str | None, float]] = []
    for kind in kinds or [images.get("outlier_kind", "hot_pixels")]:
        for fraction in [images.get("outlier_fraction", 0.0)] if fractions is None else fractions:
            pairs.append((kind, fraction) if fraction else (None, 0.0))
    return list(dict.fromkeys(pairs))
