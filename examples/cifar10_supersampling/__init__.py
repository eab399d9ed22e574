"""CIFAR-10 supersampling, the experiment of the paper that introduced ALRC.

A network restores 32x32 images whose resolution was halved. Read in this order: `photographs` and
`cifar10` (sources of images), `transformation` (their degradation), `datamodule`, `network`,
`module`, `configs` (the experiments; `configs/methods` has the methods), `training` (one training
and what is measured), `results` (its files), `expansion` and `grid` (many trainings), `together`
(many at once on one device), `clipping` and `published` (ALRC as in the authors' code), `report`
(the results), `compare` (the four-way comparison). `examples.comparison` has what several examples
use.

Reference:
    J. M. Ede and R. Beanland, "Adaptive learning rate clipping stabilizes learning", Machine
    Learning: Science and Technology 1 (2020) 015011, https://arxiv.org/abs/1906.09060.
"""
