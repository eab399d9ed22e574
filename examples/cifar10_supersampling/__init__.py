"""CIFAR-10 supersampling, the experiment of the paper that introduced ALRC.

A network is given 32x32 images whose resolution was halved and must restore them. Read in this
order: `photographs` and `cifar10` (where images come from), `transformation` (what is done to
them), `datamodule`, `network`, `module` (what is trained), `configs` (the experiments, and in
`configs/methods` what protects them; `clippers` are those of other packages), `training` (one
training and what is measured), `results` (its files), `expansion` and `grid` (many trainings, on
the machines of `backends`), `report` (what came of them), `compare` (the four-way comparison).

Reference:
    J. M. Ede and R. Beanland, "Adaptive learning rate clipping stabilizes learning", Machine
    Learning: Science and Technology 1 (2020) 015011, https://arxiv.org/abs/1906.09060.
"""

import os

import pytorch_lightning  # noqa: F401
import torch

# Lightning has set this to "1", which lets PyTorch look for NVIDIA's driver at every step of an
# Adam. Where there is none, that takes as long as the step itself.
if not torch.cuda.is_available():
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
