"""Adaptor: aligns two frozen encoders that never met, one of images and one of texts, with one light module.

Reading order, each file importing only from those before it: `config`, `model` (module and loss), `demo_encoders`,
`encoders` (frozen towers), `data` (RSNA, SIIM, COVIDx, masks), `pairs` (reports, captions), `pretraining`,
`classification`, `decoders`, `segmentation`, `export`, `figures`, `run` (one run), `grid` (all pairs of encoders,
ablations), `xrays` (the chain on real X-rays), `__main__` (command line). Reference: "Freeze the backbones: A
Parameter-Efficient Contrastive Approach to Robust Medical Vision-Language Pre-training", arXiv 2401.01179, ICASSP
2024. What is ours and not the paper's says "(ours)".
"""
