"""A config that cannot be used is refused with the key, the value and what is legal."""

from __future__ import annotations

import pytest

from jobs import config
from jobs.config import ConfigError, load


@pytest.mark.parametrize("name", config.names())
def test_every_packaged_config_is_valid_and_named_after_its_file(name):
    assert load(name).name == name


def test_overrides_reach_their_section():
    changed = load("debug/demo", ["dreambooth.steps=7", "arms=[real,measure]", "seeds=[1,2]", "edges=[8.0,9.5]"])
    assert (changed.dreambooth.steps, changed.arms, changed.seeds, changed.edges) == (7, ("real", "measure"), (1, 2), (8.0, 9.5))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("dreambooth.stepz=7", ["dreambooth.stepz", "no such key", "learning_rate", "steps"]),
        ("colour=red", ["colour", "no such key", "classifier", "view"]),
        ("classifier.epochs=none", ["classifier.epochs", "'none'", "integer"]),
        ("generation.guidance=0.5", ["generation.guidance", "0.5", "greater than or equal to 1"]),
        ("view=cat_dorsal", ["view", "'cat_dorsal'", "canine_lateral"]),
        ("arms=[real,mixed]", ["real-matched is what mixed, null, oracle, base are compared with"]),
        ("seeds=[1,1]", ["distinct"]),
        ("split.folds=1", ["at least 2"]),
        ("resolution=100", ["resolution", "100", "multiple of 8"]),
        ("steps", ["no override", "key=value"]),
    ],
)
def test_a_bad_override_says_what_is_legal(override, says):
    with pytest.raises(ConfigError) as error:
        load("debug/demo", [override])
    assert not [word for word in says if word not in str(error.value)], str(error.value)


def test_an_unknown_config_lists_the_known_ones():
    with pytest.raises(ConfigError, match="debug/ctr.*debug/demo"):
        load("debug/nothing")


def test_changed_names_dotted_keys():
    old = load("debug/demo").science
    new = load("debug/demo", ["dreambooth.steps=99", "seeds=[3]", "execution.workers=2"]).science
    assert config.changed(old, new) == ["dreambooth.steps", "seeds"]
