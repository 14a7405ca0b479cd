"""No model that any program leaves behind holds anything of a patient."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import retune
from tests.conftest import call_program, csv_rows, program_arguments, write_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def secrets(data: Path, results: Path) -> set[bytes]:
    """What no model may hold: patients' texts, pixel rows, labels, 3 neighbouring numbers of an embedding."""
    table = retune.read_table(data / "labels.csv")
    texts = [*table["patient"], *table["path"], *table["report"], "Kowalski", "ärztin"]
    found = {text.encode() for text in texts}
    for name in table["path"]:
        pixels = np.asarray(Image.open(data / name))
        found |= {pixels[k, :12].tobytes() for k in range(0, 40, 4)}
    train = np.array(table["split"]) == "train"
    for labels in (np.array(table[column], np.float32) for column in ("Edema", "Mass")):
        for kind in (np.uint8, np.int64, np.float32, np.float64):
            found |= {labels[:24].astype(kind).tobytes(), labels[train].astype(kind).tobytes()}
    for file in results.glob("cache/*/embeddings.npy"):
        for row in np.load(file):
            unit = row / np.linalg.norm(row)
            for x in (x.astype(kind) for x in (row, unit) for kind in (np.float16, np.float32, np.float64)):
                found |= {x[k : k + 3].tobytes() for k in range(0, len(x) - 2, 5)}
    return {secret for secret in found if any(secret)}


@pytest.mark.slow
def test_no_model_of_any_program_holds_anything_of_a_patient(encoder_folder, tmp_path, monkeypatch):
    """All programs and methods, finished and interrupted, in folders whose names are not ASCII."""
    data, results = (tmp_path / "Ordner mit Ä ü 影像" / name for name in ("Daten 胸部", "Ergebnisse"))
    rows = csv_rows(data, 48)
    for i, row in enumerate(rows):
        row |= {"report": f"report of ärztin number {i}", "Mass": str((i * i // 3 + i // 8) % 2)}
    write_rows(data / "labels.csv", rows)
    results.mkdir()
    monkeypatch.chdir(results)
    monkeypatch.setattr(retune, "CHUNK", 64)  # call_program sets it
    source = ["--data", "csv", "--data-dir", str(data)]
    options = [*program_arguments("retune", encoder_folder), *source, "--parts", "2", "--output"]
    for method in ("retune", "linear", "mlp", "ewc", "lwf", "replay", "analytic"):
        assert retune.main([*options, method, "--method", method]) == 0
    for program, more in {"adaptor": ["--export", "pair"], "cleft": []}.items():
        arguments = [*program_arguments(program, encoder_folder), *source, "--output", program, *more]
        assert call_program(program, arguments) == 0
    fit, trained = retune.fit, []

    def interrupted(*positional, **options):
        if trained:
            raise KeyboardInterrupt
        trained.append(fit(*positional, **options))

    monkeypatch.setattr(retune, "fit", interrupted)
    assert retune.main([*options, "interrupted"]) == 130
    kinds = (".safetensors", ".pt")
    models = [p for p in results.rglob("*") if p.is_file() and (p.suffix in kinds or p.parent.name == "pair")]
    folders = {p.relative_to(results).parts[0] for p in models}
    assert {"retune", "replay", "interrupted", "adaptor", "pair", "cleft"} <= folders
    hidden = secrets(data, results)
    assert len(hidden) > 3000
    allowed = "statistics.safetensors"  # what a method says it stores of patients, beside the model
    leaks = {(str(p), s) for p in models if p.name != allowed for s in hidden if s in p.read_bytes()}
    assert not leaks
