"""CLEFT: contrastive pre-training with a parameter-efficient language model, then a learned prompt.

In the order of use: `config`, `captions` and `data` (image-text pairs), `towers` (the encoder and its tuning),
`model` (loss and learned prompt), `training` (both stages), `evaluation`, `stages` (all in order), `tables`.
"""
