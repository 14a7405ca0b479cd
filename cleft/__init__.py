"""CLEFT, in the order of use: config, captions, data, towers, model, training, evaluation, tables."""
