"""Phantoms of three hospitals that differ in film, noise and prevalence, as PNG files and one CSV.

python -m demo.hospitals FOLDER
python retune.py --data csv --data-dir FOLDER --scenario data --parts column
"""

import argparse
import csv
import sys
from pathlib import Path

from PIL import Image

import retune
from demo import phantoms

HOSPITALS = {
    "hospital-a": phantoms.DOMAINS["demo"],
    "hospital-b": phantoms.Domain(
        (0.9, 1.15), (0.6, 0.8), 0.10, (0.5, 1.0), (0.90, 1.00), 0.5, 0.0, (0.12, 0.45, 0.08, 0.40, 0.20)
    ),
    "hospital-c": phantoms.Domain(
        (0.25, 0.40), (0.4, 0.6), 0.06, (0.4, 0.9), (0.80, 0.95), 0.5, 0.0, (0.40, 0.10, 0.35, 0.10, 0.45)
    ),
}


def draw_hospitals(folder: Path, images: int, seed: int = 0) -> Path:
    """Write `images` phantoms of each hospital and hospitals.csv into a new folder; the CSV's path."""
    with retune.atomic(retune.check_new_folder(folder)) as partial:
        partial.mkdir(parents=True)
        with open(partial / "hospitals.csv", "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["path", "patient", "part", *phantoms.FINDINGS])
            for number, (name, domain) in enumerate(HOSPITALS.items()):
                drawn = phantoms.make_phantoms(images, seed + number, domain=domain)
                (partial / name).mkdir()
                for i in range(images):
                    path = f"{name}/{i:05d}.png"
                    Image.fromarray(drawn.images[i]).save(partial / path)
                    patient = f"{name}-{drawn.patients[i].partition('-')[2]}"
                    table.writerow([path, patient, name, *drawn.labels[i].astype(int)])
    return folder / "hospitals.csv"


def execute(argv):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--images", type=int, default=2000, help="phantoms of each hospital (default: 2000)")
    arguments = parser.parse_args(argv)
    table = draw_hospitals(arguments.folder, arguments.images)
    print(f"written to {table}: phantoms, not patients; nothing measured on them is clinical")


if __name__ == "__main__":
    sys.exit(retune.main(None, execute))
