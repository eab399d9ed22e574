"""The comparison: one training, unprotected and protected in several ways, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..comparison import files
from ..comparison.compare import Comparison, Training
from ..comparison.running import check_each_once
from . import baselines
from .datamodule import PartialScans
from .figures import save_figures
from .measuring import measure, protections
from .micrographs import fingerprint

METHODS = ("none", "norm", "alrc3", "alrc3+norm")

MEASURES = {
    "rms": "test error, %",
    "rms_errors": "test error of the first stage, %",
    "mse_outer": "training error of the first stage",
}
ALSO = {"peak": "largest error", "spikes": "spikes"}


def compare(
    seeds: int = 1,
    data: Literal["shipped", "folder"] = "shipped",
    root: Path = Path("data"),
    pattern: str = "*",
    adversarial: Literal["least_squares", "wasserstein"] = "least_squares",
    methods: Sequence[str] = METHODS,
    steps: int = 1500,
    width: float = 0.0625,
    crop: int = 96,
    path: Literal["spiral", "jittered_spiral", "random_walk", "grid"] = "spiral",
    coverage: float = 1 / 20,
    workers: int | None = None,
    output: Path = Path("comparison/partial_stem"),
) -> None:
    """Train the same networks unprotected and protected in several ways, and compare.

    By default there are four ways: unprotected, with each network's gradient clipped at norm 1,
    with ALRC of each of the four losses at 3 standard deviations, and with both. A batch is one
    crop. In the first stage, three quarters of the steps, there are no discriminators. All
    trainings of one seed start from the same weights and see the same scans. Prints tables and
    writes them to report.md, beside results.csv, curves.png, images.png, losses.png (losses under
    ALRC), and a folder for each training. Finished trainings are not run again.

    Args:
        seeds: number of seeds, from 0 up.
        data: "shipped" needs no download; "folder" reads root.
        root: a folder of micrographs; the last is kept for the test.
        pattern: pattern of the names of files to read, like "truth-*".
        adversarial: kind of the discriminators' loss.
        methods: methods, like [none,alrc2].
        steps: batches of a training.
        width: factor on the networks' number of channels; 1 is the authors' network.
        crop: side of a crop in pixels, a multiple of 32.
        path: path of the probe.
        coverage: the fraction of pixels that the probe visits.
        workers: trainings at a time, each on one core; default: one per core.
        output: directory that the results are written to.
    """
    if steps < 3:
        raise ValueError(f"steps must be at least 3, so that both stages have some, got {steps!r}")
    check_each_once(methods=methods)
    for method in methods:
        protections(method)  # raises if there is no such method
    options: dict[str, Any] = {
        "data": data,
        "pattern": pattern,
        "path": path,
        "coverage": coverage,
        "crop": crop,
    }
    scans = PartialScans(**options, root=root)
    scans.setup("fit")  # raises if a file is wrong
    # The root itself may differ between machines.
    images = {"images": fingerprint(root, pattern)} if data == "folder" else {}
    comparison = Comparison(
        "partial_stem",
        partial(measure, **options, root=root, width=width),
        {adversarial: methods},
        MEASURES,
        steps,
        afterwards=lambda _: baselines.table(scans),
        options={**options, **images, "width": width},
        also=ALSO,
    )
    comparison.compare(seeds, steps, None, None, workers, output)
    runs = [Training(adversarial, each, seed, steps) for seed in range(seeds) for each in methods]
    folders = [output / run.name for run in runs]
    rows = [json.loads((folder / files.RESULT).read_text()) for folder in folders]
    save_figures(rows, folders, output)
    print(f"Drawn in {output}: curves.png, images.png, losses.png")
