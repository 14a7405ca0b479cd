"""Adaptor: aligns two frozen encoders that never met, one of images and one of texts, with one light module.

Reading order, each file importing only from those before it: `config`, `model` (module and loss), `demo_encoders`,
`encoders` (frozen towers), `data` (RSNA, SIIM, COVIDx, masks), `pretraining` (pairs, retrieval), `classification`,
`figures`, `segmentation` (decoders), `run` (one run), `grid` (pairs of encoders, ablations), `__main__`. "Freeze the
backbones", arXiv 2401.01179, ICASSP 2024; what is ours and not the paper's says "(ours)".
"""
