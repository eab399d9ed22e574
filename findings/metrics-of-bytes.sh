#!/usr/bin/env bash
# torchmetrics' errors of uint8 images are those of differences that wrap around at 256.
#
# Seen with: torchmetrics 1.9.0, scikit-image 0.26.0, torch 2.14.1, CPU, Python 3.11, 2026-11-28.
# Behaviour: MeanSquaredError and MeanAbsoluteError subtract uint8 tensors as uint8, in which 100 - 101
# is 255. So the squared error below is too small by a factor of 4, and the absolute error too large by
# a factor of 8. There is no warning. MeanAbsoluteError is meant to convert: its source asks for
# `preds.is_floating_point`, without the parentheses, which is always true. PeakSignalNoiseRatio of the
# same release converts, and agrees with scikit-image. torch's own mse_loss refuses uint8.
# For ALRC: images are read as uint8, and a comparison of clippers by these metrics can then name the
# wrong one. The modules in examples/ convert by `.float()` first.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 numpy==2.2.6 \
    torchmetrics==1.9.0 scikit-image==0.26.0
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import numpy as np
import torch
from skimage import data, metrics
from torchmetrics import ExplainedVariance, MeanAbsoluteError, MeanSquaredError
from torchmetrics.image import PeakSignalNoiseRatio

truth = data.camera()
noise = np.random.default_rng(0).normal(0, 20, truth.shape)
noisy = (truth + noise).clip(0, 255).astype(np.uint8)
bytes_, floats = [
    [torch.from_numpy(each).to(kind).flatten() for each in (noisy, truth)]
    for kind in (torch.uint8, torch.float32)
]
for metric in (
    MeanSquaredError(),
    MeanAbsoluteError(),
    ExplainedVariance(),
    PeakSignalNoiseRatio(data_range=255.0),
):
    found = metric(*bytes_).item()
    metric.reset()
    print(f"{type(metric).__name__}: uint8 {found:.2f}, float32 {metric(*floats).item():.2f}")
print(f"scikit-image: mean squared error {metrics.mean_squared_error(truth, noisy):.2f}", end="")
print(f", peak signal-to-noise ratio {metrics.peak_signal_noise_ratio(truth, noisy):.2f}")
try:
    print(torch.nn.functional.mse_loss(*bytes_))
except RuntimeError as error:
    print("torch's mse_loss:", error)
PYTHON
cat > "$folder/expected" <<'EXPECTED'
MeanSquaredError: uint8 86.53, float32 373.35
MeanAbsoluteError: uint8 127.95, float32 15.41
ExplainedVariance: uint8 0.09, float32 0.93
PeakSignalNoiseRatio: uint8 22.41, float32 22.41
scikit-image: mean squared error 373.35, peak signal-to-noise ratio 22.41
torch's mse_loss: "mse_cpu" not implemented for 'Byte'
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
