"""Synthetic frontal chest radiographs: five findings, their pixel masks and a short report, in plain numpy.

Phantoms are drawn, not photographed: they make the demo and the tests run without a download, and they say
nothing about patients. `make_phantoms` draws the labels, the anatomy and the reports of all images at once
(milliseconds); the pixels of image i are drawn when `images[i]` is read, always the same for (seed, i).

Coordinates: x in [-1, 1] from the image's left to its right, y in [-1, 1] from top to bottom. The patient's
right lung is on the image's left. `u` is the distance from the midline towards the side being drawn.
"""

from dataclasses import dataclass

import numpy as np

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PREVALENCE = np.array([0.27, 0.22, 0.17, 0.24, 0.32])
# Correlation of the findings' latent severities: heart failure brings edema and effusions, which
# compress the lung.
CO_OCCURRENCE = np.array(
    [
        [1.0, 0.1, 0.1, 0.1, 0.4],
        [0.1, 1.0, 0.0, 0.5, 0.3],
        [0.1, 0.0, 1.0, 0.1, 0.2],
        [0.1, 0.5, 0.1, 1.0, 0.4],
        [0.4, 0.3, 0.2, 0.4, 1.0],
    ]
)


@dataclass(frozen=True)
class Domain:
    """What distinguishes one hospital's films and reports from another's; pairs are (lowest, highest)."""

    contrast: tuple[float, float]  # slope of the film around its middle grey
    gamma: tuple[float, float]  # > 1 darkens the film
    noise: float  # standard deviation of the quantum noise, as a fraction of the grey range
    severity: tuple[float, float]  # of a finding that is present; 1 = florid
    magnification: tuple[float, float]  # > 1: the chest fills more of the film
    negatives: float  # probability that the report mentions an absent finding
    omissions: float  # probability that the report is silent about a present finding
    prevalence: tuple[float, ...] = tuple(PREVALENCE)  # of each finding


DOMAINS = {
    "demo": Domain((0.4, 0.7), (1.8, 2.8), 0.025, (0.5, 1.0), (0.70, 0.78), 0.5, 0.0),
    "pretrain": Domain((0.9, 1.15), (0.8, 1.1), 0.02, (0.4, 1.0), (0.97, 1.08), 0.5, 0.1),
}

SEVERITY_WORDS = {
    "Pleural Effusion": ("small", "moderate", "large"),
    "default": ("mild", "moderate", "severe"),
}
# What a radiologist calls each finding, and signs that stand for it without naming it.
TERMS = {
    "Atelectasis": (
        "{severity} {side} basilar atelectasis",
        "{side} linear atelectasis with volume loss",
        "atelectasis",
    ),
    "Cardiomegaly": ("{severity} cardiomegaly", "cardiomegaly", "an enlarged heart"),
    "Consolidation": ("{side} {zone} lung consolidation", "{severity} focal consolidation", "consolidation"),
    "Edema": (
        "{severity} pulmonary edema",
        "{severity} interstitial edema with vascular congestion",
        "edema",
    ),
    "Pleural Effusion": ("{severity} {side} pleural effusion", "{side} pleural effusion", "pleural effusion"),
}
SIGNS = {
    "Atelectasis": (
        "band like opacities at the {side} lung base",
        "low {side} lung volume with linear opacities",
    ),
    "Cardiomegaly": ("the heart is {severity}ly enlarged", "the cardiac silhouette is enlarged"),
    "Consolidation": (
        "patchy airspace opacity in the {side} {zone} lung",
        "dense {side} {zone} airspace opacity",
    ),
    "Edema": ("bilateral perihilar opacities", "bilateral perihilar haze with vascular congestion"),
    "Pleural Effusion": (
        "blunting of the {side} costophrenic angle",
        "{severity} layering {side} pleural fluid",
    ),
}
NORMAL_SIGNS = {
    "Atelectasis": ("the lungs are well expanded", "the lung bases are clear"),
    "Cardiomegaly": ("the heart is normal in size", "the cardiac silhouette is normal in size"),
    "Consolidation": ("no airspace opacity", "the lungs are clear with no focal consolidation"),
    "Edema": ("no vascular congestion", "the pulmonary vessels are normal"),
    "Pleural Effusion": ("the costophrenic angles are sharp", "the costophrenic angles are clear"),
}
PRESENT = (
    "{}",
    "there is {}",
    "{} is seen",
    "{} is present",
    "findings are consistent with {}",
    "findings suggest {}",
)
ABSENT = (
    "no {}",
    "there is no {}",
    "no {} is seen",
    "no evidence of {}",
    "no signs of acute {}",
    "{} is absent",
)


@dataclass(frozen=True)
class Phantoms:
    """N synthetic radiographs. Everything but the pixels is drawn in advance.

    images: reads as uint8 [H, W] by index; labels: float32 [N, 5], 1 or 0, columns as `class_names`;
    patients: N patient ids; reports: N texts; anatomy, films: random parameters per patient and per image.
    """

    seed: int
    size: int
    domain: Domain
    labels: np.ndarray
    severity: np.ndarray
    patients: list[str]
    reports: list[str]
    anatomy: dict[str, np.ndarray]
    films: dict[str, np.ndarray]
    class_names: tuple[str, ...] = FINDINGS

    def __len__(self):
        return len(self.labels)

    @property
    def images(self):
        return _Images(self)

    def masks(self, index):
        """Where each finding of image `index` is visible: bool [5, H, W]; empty for absent findings."""
        return self.draw(index)[1]

    def draw(self, index):
        """Image `index` as uint8 [H, W] and its masks as bool [5, H, W]."""
        generator = np.random.default_rng((self.seed, 1, index))
        parameters = {name: values[index] for name, values in (self.anatomy | self.films).items()}
        density, masks = _chest(parameters, self.severity[index], self.size, generator)
        return _expose(density, parameters, self.domain.noise, generator), masks


class _Images:
    """Sequence view of a phantom set's pixels, so that it passes where a uint8 array [N, H, W] does."""

    def __init__(self, phantoms):
        self.phantoms = phantoms

    def __len__(self):
        return len(self.phantoms)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self.phantoms.draw(int(index) % len(self))[0]


def make_phantoms(n_images, seed, size=64, domain="demo"):
    """Phantoms of about n_images / 3 patients; `domain` is a key of DOMAINS or a Domain.

    Same arguments, same bytes. Raises ValueError for no image or fewer than 16 pixels.
    """
    if n_images < 1 or size < 16:
        raise ValueError(
            f"phantoms need at least 1 image of 16 pixels, got {n_images} images of {size} pixels"
        )
    name, domain = (domain, DOMAINS[domain]) if isinstance(domain, str) else ("custom", domain)
    generator = np.random.default_rng((seed, 0))
    owner = np.sort(generator.integers(0, max(1, n_images // 3), n_images))  # image -> patient number
    n_patients = owner[-1] + 1
    factor = np.linalg.cholesky(CO_OCCURRENCE)
    patient_part = generator.standard_normal((n_patients, 5)) @ factor.T
    image_part = generator.standard_normal((n_images, 5)) @ factor.T
    latent = np.sqrt(0.6) * patient_part[owner] + np.sqrt(0.4) * image_part  # disease persists between visits
    labels = latent > np.quantile(latent, 1 - np.array(domain.prevalence), axis=0).diagonal()
    severity = np.where(labels, generator.uniform(*domain.severity, latent.shape), 0.0)
    anatomy = _anatomy(generator, n_patients)
    films = _films(generator, n_images, domain)
    return Phantoms(
        seed=seed,
        size=size,
        domain=domain,
        labels=labels.astype(np.float32),
        severity=severity,
        patients=[f"{name}-{seed}-{number:05d}" for number in owner],
        reports=[
            _report(severity[i], {k: v[i] for k, v in films.items()}, domain, generator)
            for i in range(n_images)
        ],
        anatomy={key: values[owner] for key, values in anatomy.items()},
        films=films,
    )


def _anatomy(generator, n):
    """Per-patient shape parameters, arrays [n] or [n, 2] (right, left lung)."""
    normal = generator.normal
    uniform = generator.uniform
    return {
        "width": normal(0.78, 0.03, n),  # half-width of the rib cage
        "apex": normal(-0.80, 0.025, n),
        "dome": np.stack([normal(0.43, 0.04, n), normal(0.49, 0.04, n)], 1),  # the right dome stands higher
        "heart_width": normal(0.335, 0.02, n),
        "heart_height": normal(0.34, 0.02, n),
        "rib_spacing": normal(0.165, 0.008, n),
        "rib_slope": normal(0.30, 0.05, n),
        "rib_phase": uniform(0, 1, n),
        "clavicle": normal(-0.66, 0.03, n),
        "build": uniform(0, 1, n),  # soft tissue over the lungs
        "vessels": uniform(0.6, 1.2, n),
    }


def _films(generator, n, domain):
    """Per-image parameters, arrays [n] or [n, 2]: positioning, exposure, where the findings are."""
    normal = generator.normal
    uniform = generator.uniform
    sides = generator.choice(
        3, (n, 3), p=[0.4, 0.35, 0.25]
    )  # right, left, both; the last not for consolidation
    return {
        "shift": normal(0, 0.025, (n, 2)),
        "tilt": normal(0, 0.025, n),
        "magnification": uniform(*domain.magnification, n),
        "breath": normal(0, 0.03, n),
        "contrast": uniform(*domain.contrast, n),
        "gamma": uniform(*domain.gamma, n),
        "atelectasis_side": sides[:, 0],
        "consolidation_side": sides[:, 1] % 2,
        "effusion_side": sides[:, 2],
        "band": np.stack([uniform(0.08, 0.24, n), uniform(-0.35, 0.25, n)], 1),  # height over the dome, slope
        "focus": np.stack([uniform(0.32, 0.56, n), uniform(-0.45, 0.3, n)], 1),
        "focus_radius": uniform(0.14, 0.22, n),
    }


def _report(severity, film, domain, generator):
    """A report in the radiologist's manner: what is seen, and some of what is not, in any order.

    Some reports are terse and others complete: each draws its own rate of negative statements.
    """
    negatives = domain.negatives * 2 * generator.random()
    zone = ("upper", "middle", "lower")[int(np.digitize(film["focus"][1], [-0.2, 0.05]))]
    sentences = []
    for finding, value in zip(FINDINGS, severity, strict=True):
        if value > 0 and generator.random() >= domain.omissions:
            words = SEVERITY_WORDS.get(finding, SEVERITY_WORDS["default"])
            side = film.get(f"{finding.split()[-1].lower()}_side", 0)
            sentence = _pick(generator, SIGNS[finding])
            if generator.random() < 0.7:
                sentence = _pick(generator, PRESENT).format(_pick(generator, TERMS[finding]))
            grade = words[int(np.digitize(value, [0.5, 0.75]))]
            sentences.append(
                sentence.format(severity=grade, side=("right", "left", "bilateral")[side], zone=zone)
            )
        elif value == 0 and generator.random() < negatives:
            sentence = _pick(generator, NORMAL_SIGNS[finding])
            if generator.random() < 0.7:
                term = _pick(generator, TERMS[finding]).format(severity="", side="", zone="")
                sentence = _pick(generator, ABSENT).format(term.strip())
            sentences.append(sentence)
    if not sentences:
        sentences = ["no acute cardiopulmonary abnormality"]
    text = " ".join(f"{sentences[i]}." for i in generator.permutation(len(sentences)))
    return " ".join(text.replace(" no an ", " no ").split())


def _pick(generator, choices):
    return choices[generator.integers(len(choices))]


def _step(distance, softness=0.02):
    """Soft step: 0 for distances far below zero, 1 far above. tanh neither overflows nor needs a branch."""
    return 0.5 + 0.5 * np.tanh(distance * np.float32(0.5 / softness))


def _mottle(generator, x, y, lowest, highest, waves=16):
    """Smooth random texture [H, W] of unit variance: plane waves of `lowest` to `highest` cycles per image.

    cos(a + b) = cos a cos b - sin a sin b turns the sum into two small matrix products.
    """
    frequency = np.pi * generator.uniform(lowest, highest, waves)
    angle, phase = generator.uniform(0, 2 * np.pi, (2, waves))
    across = (x[0][:, None] * (frequency * np.cos(angle))).astype(np.float32)  # [W, waves]
    down = (y[:, 0][:, None] * (frequency * np.sin(angle)) + phase).astype(np.float32)  # [H, waves]
    texture = np.cos(down) @ np.cos(across).T - np.sin(down) @ np.sin(across).T
    return texture * np.float32(np.sqrt(2 / waves))


def _chest(p, severity, size, generator):
    """Density of the projected chest, float32 [H, W] (0 is air, 1 the spine), and the masks [5, H, W]."""
    atelectasis, cardiomegaly, consolidation, edema, effusion = severity.astype(np.float32)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1) / np.float32(p["magnification"])
    x = axis[None, :] - np.float32(p["shift"][0])
    y = axis[:, None] - np.float32(p["shift"][1])
    collapsed = np.array([p["atelectasis_side"] in (0, 2), p["atelectasis_side"] in (1, 2)])
    wet = (p["effusion_side"] in (0, 2), p["effusion_side"] in (1, 2))
    # Volume loss draws the heart towards the collapsed side.
    middle = np.float32(0.04 * atelectasis * (int(collapsed[1]) - int(collapsed[0])))
    texture = _mottle(generator, x, y, 2, 9)
    fine = _mottle(generator, x, y, 8, 18, 24)
    air = np.zeros((size, size), np.float32)
    masks = np.zeros((5, size, size), bool)
    for side, sign in enumerate((-1, 1)):
        u = sign * (x - np.float32(p["tilt"]) * y)  # [H, W]
        dome_height = np.float32(p["dome"][side] + p["breath"] - 0.11 * atelectasis * collapsed[side])
        lung, outer = _lung(u, y, p, dome_height)
        radius2 = np.square(u - 0.24) + 0.7 * np.square(y + 0.02)  # from the hilum
        filled = _vessels(u, y, radius2, texture) * np.float32(p["vessels"] * 0.30 * (1 + 1.2 * edema))
        if edema:
            wing = np.exp(-radius2 / np.float32(0.05 + 0.12 * edema))
            filled = filled + np.float32(0.75 * edema) * wing * (0.8 + 0.25 * fine)
            masks[3] |= (wing * lung) > 0.35
        if consolidation and side == p["consolidation_side"]:
            distance = np.square(u - np.float32(p["focus"][0])) + np.square(y - np.float32(p["focus"][1]))
            reach = np.float32(p["focus_radius"] * (0.7 + 0.5 * consolidation))
            patch = np.exp(-np.square(distance / (reach * reach) * (1 + 0.25 * texture)))
            filled = filled + (0.35 + 0.5 * consolidation) * patch * (1 + 0.12 * fine)
            masks[2] |= (patch * lung) > 0.35
        if atelectasis and collapsed[side]:
            line = y - dome_height + np.float32(p["band"][0]) - np.float32(p["band"][1]) * (u - 0.4)
            bands = np.exp(-np.square(line / 0.022)) + 0.7 * np.exp(-np.square((line + 0.11) / 0.018))
            bands = bands * _step(u - 0.2, 0.03) * _step(0.68 - u, 0.03)
            filled = filled + (0.3 + 0.55 * atelectasis) * bands
            masks[0] |= (bands * lung) > 0.35
        if effusion and wet[side]:
            height = 0.08 + 0.62 * effusion
            surface = dome_height + 0.22 - height * (0.35 + 0.65 * np.square(np.clip(u / outer, 0, 1)))
            fluid = _step(y - surface, 0.025)  # the meniscus climbs towards the chest wall
            filled = np.maximum(filled, 0.93 * fluid)
            masks[4] |= (fluid * lung) > 0.5
        air += lung * (1 - np.clip(filled, 0, 1))
    density, heart = _soft_tissue_and_bones(x, y, p, air, middle, cardiomegaly, texture)
    masks[1] = (heart > 0.5) & bool(cardiomegaly)
    return density, masks


def _lung(u, y, p, dome_height):
    """Aerated lung of one side [H, W] in 0..1, and its lateral border [H, W]."""
    depth = np.clip((y - p["apex"]) / (dome_height - p["apex"]), 0, 1.3).astype(np.float32)
    outer = np.float32(p["width"]) * (1 - 0.58 * np.exp(-3.2 * depth)) - 0.05 * np.square(depth)
    inner = 0.115 + 0.05 * np.exp(-np.square((y + 0.05) / 0.25))
    dome = dome_height + 1.55 * np.square(u - 0.38)
    apex = np.float32(p["apex"]) + 1.6 * np.square(u - 0.30)
    lung = _step(u - inner, 0.015) * _step(outer - u, 0.015) * _step(dome - y, 0.015) * _step(y - apex, 0.015)
    return lung, outer


def _vessels(u, y, radius2, texture):
    """Branching lung markings [H, W]: rays from the hilum, bent by the texture, fading outwards."""
    angle = np.arctan2(y + 0.02, np.abs(u - 0.14) + 0.02)
    rays = 0.5 + 0.5 * np.cos(13 * angle + 1.5 * texture)
    return np.square(rays) * np.exp(-2.6 * np.sqrt(radius2)) + 0.9 * np.exp(-radius2 / 0.012)


def _soft_tissue_and_bones(x, y, p, air, middle, cardiomegaly, texture):
    """Everything around the lungs' `air`: density [H, W] and the heart's silhouette [H, W] in 0..1."""
    side = np.abs(x)
    build = np.float32(p["build"])
    shoulder = -0.97 + 0.42 * np.clip(side - 0.22, 0, None) + 0.9 * np.clip(side - 0.75, 0, None) ** 2
    body = _step(y - shoulder, 0.02) * _step(0.97 + 0.06 * build - side, 0.02)
    width = np.float32(p["heart_width"]) * (1 + 0.38 * cardiomegaly)
    across = (x - 0.10 - middle - 0.07 * cardiomegaly - 0.08 * (y - 0.25)) / width
    heart = _step(
        1 - np.sqrt(np.square(across) + np.square((y - 0.26) / np.float32(p["heart_height"]))), 0.05
    )
    central = np.square(x - 0.3 * middle)
    mediastinum = np.exp(-np.square(central / 0.022)) * _step(y + 0.95, 0.05)
    knob = np.exp(-np.square((np.square(x - 0.14 - middle) + np.square(y + 0.33)) / 0.010))
    solid = 1 - (1 - heart) * (1 - 0.85 * mediastinum) * (1 - 0.6 * knob)
    abdomen = _step(y - 0.48, 0.05)  # thick enough to hide the lower border of the heart
    air = air * (1 - 0.97 * heart) * (1 - 0.6 * knob)
    density = body * (
        0.50 + 0.08 * build - (0.40 + 0.02 * build) * air + 0.20 * solid * (1 - air) * (1 - 0.7 * abdomen)
    )
    density += body * (0.15 * abdomen + 0.015 * texture)
    density += 0.09 * np.exp(-central / 0.006) * (0.8 + 0.2 * np.cos(y * 48)) * body  # spine with its discs
    density -= 0.13 * np.exp(-central / 0.0016) * _step(-0.28 - y, 0.03) * body  # trachea
    spacing = np.float32(p["rib_spacing"])
    phase = np.float32(p["rib_phase"])
    cage = _step(p["width"] + 0.03 - side + 0.28 * np.minimum(y + 0.15, 0), 0.02) * _step(y + 0.82, 0.03)
    posterior = np.cos(2 * np.pi * ((y - np.float32(p["rib_slope"]) * np.square(side)) / spacing + phase))
    anterior = np.cos(2 * np.pi * ((y + 0.55 * side) / (1.25 * spacing) + phase)) * _step(side - 0.35, 0.05)
    ribs = 0.13 * np.square(np.clip(posterior, 0, 1)) + 0.07 * np.square(np.clip(anterior, 0, 1))
    density += ribs * cage * _step(0.62 - y, 0.08) * (1 - 0.6 * heart)
    line = y - np.float32(p["clavicle"]) + 0.26 * (side - 0.1) - 0.18 * np.square(side)
    density += 0.17 * np.exp(-np.square(line / 0.030)) * _step(side - 0.07, 0.015) * _step(0.72 - side, 0.03)
    return density.astype(np.float32), heart


def _expose(density, p, noise, generator):
    """Film response and quantum noise: uint8 [H, W]."""
    film = np.clip(1.12 * density, 0, 1) ** np.float32(p["gamma"])
    film = 0.5 + np.float32(p["contrast"]) * (film - 0.5)
    film += generator.standard_normal(film.shape, np.float32) * np.float32(noise)
    return (np.clip(film, 0, 1) * 255).astype(np.uint8)
