import json

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


def test_the_study_s_template_tells_classes_apart_by_the_token():
    settings = DreamBooth(
        token="sks {size}",
        instance_prompt="photo of {token} Cardiovascular Thoracic radiograph x-ray",
        class_prompt="photo of Cardiovascular Thoracic radiograph x-ray",
    )
    assert prompts.instance_prompt(settings, DOG, "large") == "photo of sks large Cardiovascular Thoracic radiograph x-ray"
    assert {prompts.class_prompt(settings, DOG, name) for name in CLASSES} == {"photo of Cardiovascular Thoracic radiograph x-ray"}
    assert not prompts.names_source(settings) and prompts.names_source(settings.model_copy(update={"token": "{source} {size}"}))
    with pytest.raises(ValueError, match="'token'.*size, subject, source"):
        prompts.instance_prompt(DreamBooth(token="{token}"), DOG, "large")


def concept(folder, text="", class_data_dir=None):
    return {
        "instance_prompt": f"photo of {text or folder} heart",
        "class_prompt": "photo of a heart",
        "instance_data_dir": f"data/{folder}",
        "class_data_dir": class_data_dir,
    }


def test_a_concepts_list_gives_each_class_its_prompts(tmp_path):
    file = tmp_path / "concepts_list.json"
    file.write_text(json.dumps([concept("Small/"), concept("normal"), concept("large", "{size} abc"), concept("large-jsrt")]))
    settings = DreamBooth(concepts=str(file))
    assert settings.concepts == DreamBooth(concepts=json.loads(file.read_text())).concepts, "what the file says, not where it is"
    assert prompts.instance_prompt(settings, DOG, "small", "anywhere") == "photo of Small/ heart"
    assert prompts.instance_prompt(settings, DOG, "large", "anywhere") == "photo of large abc heart"
    assert prompts.instance_prompt(settings, DOG, "large", "jsrt") == "photo of large-jsrt heart"
    assert prompts.class_prompt(settings, DOG, "normal") == "photo of a heart" and prompts.names_source(settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([concept("dogs")], "'data/dogs': its last folder must be small, normal, large"),
        ([concept("small"), concept("SMALL")], "two concepts for small"),
        ([concept("small"), concept("large")], "no concept for normal"),
    ],
)
def test_concepts_that_fit_no_class_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        prompts.concepts(DreamBooth(concepts=given))


def test_a_file_that_is_no_concepts_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.json cannot be read as a concepts_list.json"):
        DreamBooth(concepts=str(tmp_path / "nothing.json"))
    with pytest.raises(ValueError, match="instance_data_dir"):
        DreamBooth(concepts=[{"instance_prompt": "a", "class_prompt": "b"}])


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
