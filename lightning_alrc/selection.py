"""``without_spikes``: a dataset without the samples that a record or a ledger names."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from lightning_alrc._moments import arguments
from lightning_alrc._spikes.ids import as_list, encodable
from lightning_alrc._spikes.record import Spike
from lightning_alrc._spikes.record_file import read_spikes

__all__ = ["without_spikes"]

SHOWN = 10
"""Largest number of ids that are printed."""


def without_spikes(
    dataset: Any,
    source: Any,
    *,
    worst: int | None = None,
    by: str = "mean",
    ids: Sequence[Any] | Callable[[int], Any] | None = None,
    name: str | None = None,
) -> Subset[Any]:
    """A dataset without the samples that spiked. Prints which samples are left out.

    >>> rest = without_spikes(list(range(100)), [7, 42])
    without_spikes leaves out 2 of 100 samples: 7, 42
    >>> len(rest)
    98

    The same source always leaves out the same samples, in a resumed training, too. A training
    overwrites its own record and ledger, so give the files of an earlier training.

    Args:
        dataset: has a length, and samples by index.
        source: what names the samples, one of:

            - a record of spikes: its path, like ``"alrc_spikes.jsonl"``, the folder of a training's
              logs, or a list of :class:`~lightning_alrc.spikes.Spike`. A spike of a whole batch's
              loss names no sample.
            - a ledger: its path, with "ledger" in the file's name, or what
              :func:`~lightning_alrc.read_ledger` returned.
            - a list of ids, the worst first.
        worst: how many ids are left out, the worst first. ``None``, the default, leaves out all ids
            of the record or the list. For a ledger ``worst`` must be given, because a ledger has
            every sample.
        by: column of the ledger that ranks samples, the largest value first. Default: ``"mean"``.
            Samples with equal values are ordered by the mean. NaN counts as the largest value.
        ids: the id of each sample of ``dataset``: a list, array or tensor with one id for each
            sample, or a function that returns the id for an index. ``None``, the default, if the
            ids are the indices; if ``dataset`` is a ``Subset``, the indices in the whole dataset.
        name: name of the loss. ``None``, the default, uses all losses of a record, or the only loss
            of a ledger.

    Returns:
        The samples that are not left out, in the order of the dataset.

    Raises:
        ImportError: if ``source`` is the path of a ledger, and pandas is not installed, or pyarrow
            for a Parquet file.
        OSError: if there is no such file, or the file cannot be read.
        TypeError: if an argument has a wrong type.
        ValueError: if an argument is out of its range, or nothing names a sample of the dataset.
    """
    if worst is not None:
        worst = arguments.count("worst", worst)
    named = _ids_of(source, worst, by, name)[:worst]
    length = len(dataset)
    index_of = _indices(named, dataset, ids)
    found = [each for each in named if encodable(each) in index_of]
    if named and not found:
        raise ValueError(
            f"ids must be those of the source, like {named[0]!r}, got others for all {length:,} "
            "samples of the dataset"
        )
    left_out = {index for each in found for index in index_of[encodable(each)]}
    _print_left_out(found, len(named) - len(found), len(left_out), length)
    return Subset(dataset, [index for index in range(length) if index not in left_out])


def _ids_of(source: Any, worst: int | None, by: str, name: str | None) -> list[Any]:
    """The ids that the source names, the worst first, each once."""
    if isinstance(source, (str, Path)):
        if "ledger" in Path(source).name and not Path(source).is_dir():
            from lightning_alrc.ledger import read_ledger  # needs pandas

            source = read_ledger(source, name)
        else:
            source = read_spikes(source)
    if hasattr(source, "columns"):
        if worst is None:
            raise ValueError("worst must say how many samples a ledger names, got None")
        if by not in source.columns or by == "id":
            allowed = [column for column in source.columns if column != "id"]
            raise ValueError(f"by must be one of the ledger's columns, {allowed}, got {by!r}")
        ranked = source.fillna(dict.fromkeys((by, "mean"), math.inf))
        ranked = ranked.sort_values([by, "mean"], ascending=False, kind="stable")
        return as_list(ranked["id"].head(worst))
    if isinstance(source, Iterable):
        listed = list(source)
        if listed and all(isinstance(each, Spike) for each in listed):
            names = sorted({each.name for each in listed})
            if name is not None and name not in names:
                raise ValueError(
                    f"name must be one of the losses with spikes, {names}, got {name!r}"
                )
            spikes = [each for each in listed if name in (None, each.name)]
            listed = [each.id for each in spikes if type(each.id) is not list]
            listed = [each for each in listed if each is not None]
            if not listed:
                raise ValueError(
                    "source must have spikes of single samples that have an id, got "
                    f"{len(spikes)} others"
                )
        else:
            listed = as_list(source if hasattr(source, "tolist") else listed)
        return list(dict.fromkeys(listed))
    raise TypeError(
        f"source must be a path, a ledger or a list, got {source!r:.100} of type "
        f"{type(source).__name__}"
    )


def _in_whole(dataset: Any) -> tuple[Any, list[Any] | None]:
    """The dataset that a subset is of, and there the indices of its samples.

    A subset may be of another subset. A dataset that is no subset is returned with ``None``.
    """
    indices = None
    while isinstance(dataset, Subset):
        own = as_list(dataset.indices)
        indices = own if indices is None else [own[each] for each in indices]
        dataset = dataset.dataset
    return dataset, indices


def _indices(named: list[Any], dataset: Any, ids: Any) -> dict[str, list[int]]:
    """The indices of the named samples, by id as :func:`encodable` writes it."""
    wanted, length = set(map(encodable, named)), len(dataset)
    if ids is None:
        whole, ids = _in_whole(dataset)
        for each in named:
            if type(each) is not int or not 0 <= each < len(whole):
                raise ValueError(
                    "ids must say which samples have the ids of the source, because not all of "
                    f"these are indices from 0 to {len(whole) - 1}, got None for {each!r:.100}"
                )
        if ids is None:
            return {encodable(each): [each] for each in named}
    if callable(ids):
        listed = as_list([ids(index) for index in range(length)])
    else:
        listed = as_list(ids)
        if len(listed) != length:
            raise ValueError(
                f"ids must have one for each of the dataset's {length} samples, got {len(listed)}"
            )
    indices: dict[str, list[int]] = {}
    for index, each in enumerate(map(encodable, listed)):
        if each in wanted:
            indices.setdefault(each, []).append(index)
    return indices


def _print_left_out(found: list[Any], not_found: int, left_out: int, length: int) -> None:
    """Print on rank 0 which samples are left out.

    Args:
        found: the ids of samples in the dataset.
        not_found: number of ids that are not in the dataset.
        left_out: number of samples with the ids in ``found``.
        length: number of samples in the dataset.
    """
    from lightning_utilities.core.rank_zero import rank_zero_only

    if getattr(rank_zero_only, "rank", 0) != 0:
        return
    shown = ", ".join(map(encodable, found[:SHOWN]))
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    others = f"; {not_found:,} more are not in it" if not_found else ""
    text = f"without_spikes leaves out {left_out:,} of {length:,} samples: {shown}{more}{others}"
    # On Windows, a file that the output is redirected to may lack the characters of an id.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
