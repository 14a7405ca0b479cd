"""Methods beside RE-tune, and what compares them. `--method NAME` imports the class only when needed."""

METHODS = {
    "linear": "experiments.baselines:Linear",
    "mlp": "experiments.baselines:MLP",
    "ewc": "experiments.baselines:EWC",
    "lwf": "experiments.baselines:LwF",
    "replay": "experiments.baselines:Replay",
    "joint": "experiments.baselines:Joint",
    "ncm": "experiments.streaming:NCM",
    "slda": "experiments.streaming:SLDA",
    "ranpac": "experiments.streaming:RanPAC",
    "l3a": "experiments.streaming:L3A",
    "distil": "experiments.baselines:Distil",
    "analytic": "experiments.analytic:Analytic",
}
