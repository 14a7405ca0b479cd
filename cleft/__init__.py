"""CLEFT: contrastive pre-training with a parameter-efficient language model, then a learned prompt.

In the order of use: `config` (settings), `data` and `captions` (image-text pairs), `towers` (the encoder and
its tuning), `model` (loss and learned prompt), `training` (both stages), `evaluation`, `pipeline` (stages in
order), `tables` (tables and figures of many runs), `__main__` (command line).
"""
