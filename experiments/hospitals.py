"""Hospitals as parts (ours): a task per value of the table's column `part`, and what is forgotten of each.

`retune.run` with `--scenario data --parts column` takes tasks from `column_tasks` and ends with `measure`.
A part is a hospital, a scanner, a year. `python -m demo.hospitals FOLDER` draws three to try it on.
"""

import numpy as np

import retune


def column_tasks(config, data) -> list[retune.Task]:
    """A data-incremental task per part, in the order of the training rows or of --part-order."""
    if config.scenario != "data" or config.contiguous or data.part is None:
        raise retune.InputError("--parts column needs --scenario data and a column `part`, no --contiguous")
    part = np.asarray(data.part, str)
    _, first, patient = np.unique(data.patients, return_index=True, return_inverse=True)
    for i in np.flatnonzero((part != part[first[patient]]) | (part == ""))[:1]:
        other = first[patient[i]]
        parts = f"part '{part[other]}' ({data.rows[other]}) and here in part '{part[i]}'"
        reason = f"patient {data.patients[i]} is in {parts}; parts share no patient"
        raise retune.InputError(f"{data.rows[i]}: {reason}")
    train = data.where("train")
    found = list(dict.fromkeys(part[train].tolist()))
    order = list(config.part_order or found)
    if sorted(order) != sorted(found):
        rule = f"must name each part once: {', '.join(found)}"
        raise retune.InputError(f"--part-order {' '.join(order)} {rule}")
    everything = tuple(range(len(data.class_names)))
    return [retune.Task(name, train[part[train] == name], everything) for name in order]


def measure(config, folder, data, tasks, embeddings, bank, model) -> dict:
    """{"parts" [U], "auroc" [T + 1, U], "auroc_ci", "forgetting" [U]}: macro AUROC on test images of part u.

    Row 0 is zero-shot, row t the adaptors after the t-th part; parts without training images come last.
    forgetting: a part's highest AUROC from its own task to the last but one, minus its last.
    """
    test = data.where("test")
    part = np.asarray(data.part, str)[test]
    names = list(dict.fromkeys([*(task.name for task in tasks), *part.tolist()]))
    stages = [retune.RETune(embeddings.shape[1], adapt="none", pool=config.pool, negatives=config.negatives)]
    paths = [folder / f"task_{k}.safetensors" for k in range(1, len(tasks) + 1)]
    stages += [retune.load_model(path, config)[0].to(bank.embeddings.device) for path in paths]
    auroc = np.full((len(stages), len(names)), np.nan)
    intervals = np.full((len(stages), len(names), 2), np.nan)
    for t, stage in enumerate(stages):
        for u, rows in enumerate(test[part == name] for name in names):
            if len(rows):
                scores, decisions = retune.score_rows(stage, bank, embeddings, rows, config.score)
                found = retune.evaluate(scores, decisions, data.labels[rows], data.class_names)
                auroc[t, u] = found["auroc_macro"]
                intervals[t, u] = retune.bootstrap_ci(scores, data.labels[rows], data.patients[rows])
    last = len(tasks)
    drops = [auroc[u + 1 : last, u].max() - auroc[last, u] for u in range(last - 1)]
    drops += [None] * (len(names) - len(drops))
    if config.figures:  # in the form of the run's other figures
        shown = [{"test": {"auroc": dict(zip(names, row))}} for row in auroc.tolist()]
        shown = {"config": vars(config), "classes": names, "tasks": [{"name": task.name} for task in tasks],
                 "zero_shot": shown[0], "after_task": shown[1:]}  # fmt: skip
        retune.heatmap(folder / "parts.png", shown, "auroc", "test macro AUROC by part", 0.5)
    return {"parts": names, "auroc": auroc.tolist(), "auroc_ci": intervals.tolist(), "forgetting": drops}


def summary(block: dict) -> str:
    """The matrix and what is forgotten, as text."""
    names = ["zero-shot", *(f"after {name}" for name in block["parts"])]
    rows = [[name, *values] for name, values in zip(names, block["auroc"])]
    rows.append(["forgetting", *block["forgetting"]])
    return retune.markdown_table(["test macro AUROC by part (ours)", *block["parts"]], rows)
