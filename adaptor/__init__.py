"""Adaptor: aligns two frozen encoders that never met, one of images and one of texts, with one light module.
In reading order: config, model, demo_encoders, encoders, data, pretraining, classification, figures,
segmentation, run, grid. "Freeze the backbones", arXiv 2401.01179; what is not the paper's says "(ours)"."""
