"""CIFAR-10 supersampling, the experiment of the paper that introduced ALRC.

A network is given 32x32 images whose resolution was halved and must restore them. Read in this
order: `photographs` and `cifar10` (where images come from), `transformation` (what is done to
them), `datamodule`, `network`, `module` (what is trained), `configs` (the experiments, and in
`configs/methods` what protects them), `training` (one training and what is measured), `results`
(its files), `expansion` and `grid` (many trainings), `together` (many at once on one device),
`clipping` and `published` (ALRC as the authors' code for the paper has it), `report` (what came of
them), `compare` (the four-way comparison). What other examples use as well is in
`examples.comparison`.

Reference:
    J. M. Ede and R. Beanland, "Adaptive learning rate clipping stabilizes learning", Machine
    Learning: Science and Technology 1 (2020) 015011, https://arxiv.org/abs/1906.09060.
"""
