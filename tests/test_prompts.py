import numpy as np
import pytest

from vhs import prompts
from vhs.measure import CLASSES, VIEWS
from vhs.settings import DreamBooth

DOG, HUMAN = VIEWS["canine_lateral"], VIEWS["human_frontal"]


def test_an_instance_prompt_is_the_class_prompt_and_a_token():
    settings = DreamBooth()
    for view in (DOG, HUMAN):
        for name in CLASSES:
            instance, of_class = prompts.instance_prompt(settings, view, name), prompts.class_prompt(settings, view, name)
            assert instance.replace("sks ", "") == of_class
            assert name in of_class.split() and view.subject in of_class.split()


def test_a_template_may_name_the_source_and_is_tidy_without_one():
    settings = DreamBooth(instance_prompt="{token} {source} film of a {size} heart")
    assert prompts.instance_prompt(settings, DOG, "large", "jsrt") == "sks jsrt film of a large heart"
    assert prompts.instance_prompt(settings, DOG, "large") == "sks film of a large heart"


def test_errors_name_the_legal_fields_and_classes():
    with pytest.raises(ValueError, match="'colour'.*token, size, subject, source"):
        prompts.instance_prompt(DreamBooth(instance_prompt="{colour} heart"), DOG, "large")
    with pytest.raises(ValueError, match="'huge'.*small, normal, large"):
        prompts.class_prompt(DreamBooth(), DOG, "huge")


def test_pretraining_prompts_always_name_class_and_subject_and_are_a_function_of_the_stream():
    drawn = [prompts.pretraining_prompt(HUMAN, "normal", np.random.default_rng([seed])) for seed in range(200)]
    assert drawn == [prompts.pretraining_prompt(HUMAN, "normal", np.random.default_rng([seed])) for seed in range(200)]
    assert all("normal" in text and "human" in text and "  " not in text and " ," not in text for text in drawn)
    plain = prompts.class_prompt(DreamBooth(), HUMAN, "normal")
    assert sum(text == plain for text in drawn) > 40, "the wording used for class images must be common"
    assert any(text != plain and text.endswith(plain.removeprefix("photo of ")) for text in drawn), "the wording of instances must occur"
