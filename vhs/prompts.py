"""What is said to the generator: prompts for instances, for class images, and the words the embedded base learnt.

A prompt names the heart's size class and the subject, because size is what DreamBooth must carry over and one base draws both views.
The templates are settings with four fields: {token} {size} {subject} {source}; `source` (the scanner or clinic) is for data whose
sources look different, so that the generator does not have to explain the difference by the heart's size. The token may name the other
three itself: with the study's template it is the token that tells the classes apart. A concepts_list.json, as other DreamBooth programs
take it, gives every class prompts of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from string import Formatter

import numpy as np

from vhs.measure import CLASSES, View
from vhs.settings import Concept, DreamBooth

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


def concepts(settings: DreamBooth) -> dict[tuple[str, str | None], Concept]:
    """(class, source or None) -> its entry of settings.concepts, by the last folder of instance_data_dir: `large`, or `large-jsrt` for one source.

    ValueError for a folder that names no class, an entry that comes twice, a class without an entry.
    """
    found: dict[tuple[str, str | None], Concept] = {}
    for concept in settings.concepts:
        name, _, source = PurePosixPath(concept.instance_data_dir).name.replace("_", "-", 1).partition("-")
        if name.lower() not in CLASSES:
            raise ValueError(
                f"concept with instance_data_dir {concept.instance_data_dir!r}: its last folder must be {', '.join(CLASSES)}, or a class and a "
                "source, as in large-jsrt"
            )
        if (key := (name.lower(), source or None)) in found:
            raise ValueError(f"two concepts for {'-'.join(filter(None, key))}: their instance_data_dir ends alike")
        found[key] = concept
    if found and (missing := set(CLASSES) - {name for name, _ in found}):
        raise ValueError(f"no concept for {', '.join(sorted(missing))}: each class needs one, by the last folder of its instance_data_dir")
    return found


def names_source(settings: DreamBooth) -> bool:
    """Whether an instance prompt says what source its image has."""
    templates = [concept.instance_prompt for concept in settings.concepts] or [settings.instance_prompt]
    by_field = any("{source}" in template.replace("{token}", settings.token) for template in templates)
    return by_field or any(source for _, source in concepts(settings))


def _prompt(kind: str, settings: DreamBooth, view: View, class_name: str, source: str | None) -> str:
    """The `kind` of prompt, instance_prompt or class_prompt, of the concept where there are some, its fields filled in."""
    if class_name not in CLASSES:
        raise ValueError(f"no prompt for class {class_name!r}: classes are {', '.join(CLASSES)}")
    if found := concepts(settings):
        if (concept := found.get((class_name, source)) or found.get((class_name, None))) is None:
            raise ValueError(f"no concept for {class_name} of source {source!r}: give one whose instance_data_dir ends in {class_name}")
        template = getattr(concept, kind)
    else:
        template = getattr(settings, kind)
    values = {"size": class_name, "subject": view.subject, "source": source or ""}
    return _fill(template, {"token": _fill(settings.token, values), **values})


def _fill(template: str, values: dict[str, str]) -> str:
    unknown = {field for _, field, _, _ in Formatter().parse(template) if field is not None} - set(values)
    if unknown:
        raise ValueError(f"prompt template {template!r} uses {', '.join(sorted(map(repr, unknown)))}; fields can be {', '.join(values)}")
    return " ".join(template.format(**values).split())


def instance_prompt(settings: DreamBooth, view: View, class_name: str, source: str | None = None) -> str:
    """The prompt of a training image, and of the images generated after it (DreamBooth, Ruiz et al. 2023, section 3.1)."""
    return _prompt("instance_prompt", settings, view, class_name, source)


def class_prompt(settings: DreamBooth, view: View, class_name: str, source: str | None = None) -> str:
    """The prompt of a class image, which keeps the base model from forgetting what the class looks like (section 3.2)."""
    return _prompt("class_prompt", settings, view, class_name, source)


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
