"""Worked examples of lightning-alrc, each run with ``python -m examples.<name>``."""

import os

import pytorch_lightning  # noqa: F401
import torch

# Lightning sets the variable below to "1". PyTorch then looks for NVIDIA's driver at every step of
# Adam. On a machine without the driver, the search takes as long as the step itself.
if not torch.cuda.is_available():
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
