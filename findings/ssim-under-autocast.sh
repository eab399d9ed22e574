#!/usr/bin/env bash
# SSIM by torchmetrics is wrong under Lightning's bf16-mixed, without a warning.
#
# Seen with: torchmetrics 1.9.0, lightning 2.6.6, torch 2.14.1, CPU, Python 3.11, 2026-11-28.
# Behaviour: StructuralSimilarityIndexMeasure blurs by conv2d. Lightning runs test_step under
# autocast, so that conv2d is in bfloat16, although both images are float32. A variance is then the
# difference of two rounded means, and the error is in the second or third digit. The same metric
# outside autocast, and PSNR under autocast, are right.
# For ALRC: examples/cifar10_supersampling computes SSIM outside autocast.
# Output seen: the lines below `expected`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet \
    torch==2.14.1 numpy==2.2.6 lightning==2.6.6 torchmetrics==1.9.0
"$folder/venv/bin/python" - > "$folder/found" 2> "$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure


class Measured(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.psnr = PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self.outside = StructuralSimilarityIndexMeasure(data_range=1.0)

    def test_step(self, batch, batch_idx):
        blurred = interpolate(interpolate(batch, scale_factor=0.5, mode="area"), scale_factor=2)
        self.psnr(blurred, batch)
        self.ssim(blurred, batch)
        with torch.autocast("cpu", enabled=False):
            self.outside(blurred, batch)
        self.log_dict({"psnr": self.psnr, "ssim": self.ssim, "outside autocast": self.outside})


torch.manual_seed(0)
images = interpolate(torch.rand(64, 3, 8, 8), 32, mode="bicubic").clamp(0, 1)
found = {}
for precision in ("32-true", "bf16-mixed"):
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (found[precision],) = trainer.test(Measured(), DataLoader(images, batch_size=16), verbose=False)
for name, right in found["32-true"].items():
    error = abs(found["bf16-mixed"][name] / right - 1)
    print(f"{name}: {'right' if error < 1e-5 else 'wrong' if error > 1e-3 else 'near'}")
PYTHON
cat > "$folder/expected" <<'EXPECTED'
psnr: right
ssim: wrong
outside autocast: right
EXPECTED
diff "$folder/expected" "$folder/found" && echo "as described"
