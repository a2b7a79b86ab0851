"""What is said to the generator: prompts for instances, for class images, and the words the embedded base learnt.

A prompt names the heart's size class and the subject, because size is what DreamBooth must carry over and one base draws both views.
The templates are settings with four fields: {token} {size} {subject} {source}; `source` (the scanner or clinic) is for data whose
sources look different, so that the generator does not have to explain the difference by the heart's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

import numpy as np

from vhs.measure import CLASSES, View
from vhs.settings import DreamBooth

FIELDS = ("token", "size", "subject", "source")

# The first is DreamBooth.instance_prompt. In the others the words mean the same in another order, so that a user's own template works.
TEMPLATES = (
    "photo of {token} {size} {subject} heart Cardiovascular Thoracic radiograph x-ray",
    "photo of {token} {subject} {size} heart Cardiovascular Thoracic radiograph x-ray",
    "{token} x-ray of a {subject} with a {size} heart",
    "{token} radiograph of the {subject} thorax, {size} heart",
    "a {token} chest x-ray, {subject}, {size} heart size",
    "{size} heart, {subject}, {token} thoracic radiograph",
    "photo of {token} {size} {subject} heart",
)
_OTHER_WORDS = (
    "an in and on view left right lateral frontal canine patient scan hospital image picture film class cardiac vertebral source scanner"
)


def _fill(template: str, settings: DreamBooth, view: View, class_name: str, source: str | None) -> str:
    unknown = {field for _, field, _, _ in Formatter().parse(template) if field is not None} - set(FIELDS)
    if unknown:
        raise ValueError(f"prompt template {template!r} uses {', '.join(sorted(map(repr, unknown)))}; fields can be {', '.join(FIELDS)}")
    if class_name not in CLASSES:
        raise ValueError(f"no prompt for class {class_name!r}: classes are {', '.join(CLASSES)}")
    return " ".join(template.format(token=settings.token, size=class_name, subject=view.subject, source=source or "").split())


def instance_prompt(settings: DreamBooth, view: View, class_name: str, source: str | None = None) -> str:
    """The prompt of a training image, and of the images generated after it (DreamBooth, Ruiz et al. 2023, section 3.1)."""
    return _fill(settings.instance_prompt, settings, view, class_name, source)


def class_prompt(settings: DreamBooth, view: View, class_name: str, source: str | None = None) -> str:
    """The prompt of a class image, which keeps the base model from forgetting what the class looks like (section 3.2)."""
    return _fill(settings.class_prompt, settings, view, class_name, source)


def pretraining_prompt(view: View, class_name: str, rng: np.random.Generator) -> str:
    """One of the ways the base learns to hear (view, class).

    The study's wording half of the time. One prompt in three carries a nonsense token where DreamBooth will put its own: the base
    then reads the rest of such a prompt as before, and fine-tuning starts from the right size of heart.
    """
    template = TEMPLATES[0] if rng.random() < 0.5 else TEMPLATES[rng.integers(len(TEMPLATES))]
    token = "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3)) if rng.random() < 1 / 3 else ""
    return " ".join(template.format(token=token, size=class_name, subject=view.subject).split()).replace(" ,", ",")


def vocabulary(views: list[View]) -> Iterator[str]:
    """The text the base's byte-pair tokenizer is trained on: every wording of every (view, class), and words users may add."""
    for template in TEMPLATES:
        for view in views:
            for class_name in CLASSES:
                yield " ".join(template.format(token="", size=class_name, subject=view.subject).split())
    yield from [_OTHER_WORDS] * len(TEMPLATES)
