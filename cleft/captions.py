"""Captions that say only what is known, and class prompts in the same form; the wording is ours."""

from cleft.config import Config

# The assessment letters of EMBED's clinical table, mildest first, and the densities of the ACR.
BI_RADS = {"N": "BI-RADS 1, negative", "B": "BI-RADS 2, benign", "A": "BI-RADS 0, incomplete",
           "P": "BI-RADS 3, probably benign", "S": "BI-RADS 4, suspicious",
           "M": "BI-RADS 5, highly suggestive of malignancy", "K": "BI-RADS 6, known malignancy"}  # fmt: skip
DENSITY = {"1": "almost entirely fatty", "2": "scattered fibroglandular densities",
           "3": "heterogeneously dense", "4": "extremely dense"}  # fmt: skip
# Class name: what is known of an image of that class
MAMMOGRAM_CLASSES = {text.split(",")[0]: {"assessment": letter} for letter, text in BI_RADS.items()}
MAMMOGRAM_CLASSES |= {f"Density {letter}": {"density": digit} for letter, digit in zip("ABCD", DENSITY)}


def chest_caption(labels: list[float], names: list[str], config: Config) -> str:
    """The caption of an image from its labels [C], or "" when nothing is known that it could say."""
    known = {name.lower(): label for name, label in zip(names, labels, strict=True)}
    said = [name for name, label in known.items() if label == 1]
    absent = [name for name, label in known.items() if label == 0 and name != "no finding"]
    if not said and len(absent) == len(known) - ("no finding" in known):
        said = ["no finding"]
    said += [f"no {name}" for name in absent] if config.negative_captions else []
    return f"{config.base_caption} {', '.join(said)}" if said else ""


def mammogram_caption(facts: dict[str, str], style: str) -> str:
    """A caption from what is known of a mammogram. simple: view, assessment and density. natural: sentences
    of all facts, age, race, mass and calcification too. structural: a labelled list of them."""
    side = {"L": "left", "R": "right"}.get(facts.get("side"))
    film = " ".join(filter(None, [side, facts.get("position"), "mammogram"]))
    assessment = BI_RADS.get(facts.get("assessment"))
    density = DENSITY.get(facts.get("density"))
    if style == "simple":
        said = filter(None, [assessment, density and f"breast density {density}"])
        return f"a {film} with {', '.join(said)}"
    patient = filter(None, [facts.get("age") and f"{facts['age']} years", facts.get("race")])
    found = [name for name in ("mass", "calcification") if facts.get(name)]
    said = {"image": film, "patient": ", ".join(patient), "breast density": density}
    said |= {"finding": " and ".join(found), "assessment": assessment}
    link, between = (": ", "; ") if style == "structural" else (" is ", ". the ")
    text = between.join(f"{label}{link}{value}" for label, value in said.items() if value)
    return text if style == "structural" else f"the {text}"


def class_prompt(name: str, config: Config) -> str:
    """The zero-shot prompt of a class, in the form of the training captions."""
    if name in MAMMOGRAM_CLASSES:
        return mammogram_caption(MAMMOGRAM_CLASSES[name], config.caption_style)
    return f"{config.base_caption} {name.lower()}"


def class_phrase(name: str) -> str:
    """What stands after a learned context: the class as captions name it."""
    facts = MAMMOGRAM_CLASSES.get(name)
    return mammogram_caption(facts, "simple").split(" with ")[1] if facts else name.lower()
