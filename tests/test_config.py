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
        ("classifier.epochs=none", ["classifier.epochs", "'none'", "a whole number, at least 1"]),
        ("generation.guidance=0.5", ["generation.guidance", "0.5", "a number, at least 1"]),
        ("view=cat_dorsal", ["view", "'cat_dorsal'", "canine_lateral"]),
        ("arms=[real,mixed]", ["real-matched is what mixed, null, oracle, base are compared with"]),
        ("seeds=[1,1]", ["distinct"]),
        ("split.folds=1", ["at least 2"]),
        ("resolution=-5", ["resolution", "-5", "a whole number, at least 32, a multiple of 8"]),
        ("steps", ["no override", "key=value"]),
        ("=5", ["no override", "key=value"]),
        ("seeds=0", ["seeds = 0", "a list", "write seeds=[0]"]),
        ("seeds=[x]", ["seeds.0 = 'x'", "a whole number"]),
        ("edges=[8]", ["edges = [8]", "a list of 2 entries"]),
        ("generation=5", ["generation = 5", "a section", "guidance", "write generation.KEY=VALUE"]),
        ("generation.solver=foo", ["generation.solver = 'foo'", "dpm++, sde-dpm++, pndm"]),
        ("classifier.unfreeze=-1", ["classifier.unfreeze = -1", "all or a whole number, at least 0"]),
        ("classifier.flip=maybe", ["'maybe'", "true or false"]),
        ("name=", ["name = null", "text"]),
        ("arms=[mixed", ["'arms=[mixed' cannot be read", "close what is opened", "'arms=[real, real-matched, mixed]'"]),
    ],
)
def test_a_bad_override_says_what_is_legal(override, says):
    with pytest.raises(ConfigError) as error:
        load("debug/demo", [override])
    said = str(error.value)
    assert not [word for word in says if word not in said] and "Input should" not in said and len(said.splitlines()) == 1, said


def test_keys_that_nobody_knows_are_one_line_with_what_is_legal(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nview: canine_lateral\n" + "".join(f"{letter}: 1\n" for letter in "abcdefgh") + "split: {fold: 2, 5: 3}\n")
    with pytest.raises(ConfigError) as error:
        load(str(file))
    first, second = sorted(str(error.value).splitlines())
    assert first.startswith("a, b, c, d, e, f and 2 more: no such keys. Legal here: arms, base,")
    assert second.startswith("split.fold, split.5: no such keys. Legal here: duplicate_bits, folds,")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\n", "has no name and no view, and nobody knows its a, b. vhs init DATA"),
        ("name: mine\nquestion: pooled\nconfig: demo\n", "a study: vhs study "),
        ("partition: gpu\naccount: me\n", "--cluster "),
        ("views: [canine_lateral]\n", "vhs pretrain "),
        ("generated_share: 1\n", "--space "),
    ],
)
def test_a_file_of_another_kind_is_named_with_its_command(tmp_path, text, says):
    file = tmp_path / "other.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="another kind of file") as error:
        load(str(file))
    assert says in str(error.value) and "Legal here" not in str(error.value)


def test_what_is_no_configuration_is_sent_to_the_command_that_takes_it(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "labels.csv").write_text("file,class\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text("{}")
    for name, says in (
        ("calibration", "it is a study, so: vhs study calibration"), (tmp_path / "films", f"it is data, for which vhs init {tmp_path / 'films'} --out"),
        (tmp_path / "labels.csv", "it is data"), ("s3://bucket/films", "it is data"), (tmp_path / "run", "it is a run.*vhs status"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            load(str(name))
    with pytest.raises(ConfigError, match="no study 'demo': it is the configuration of a run, so: vhs run demo"):
        config.find("demo", "studies")


def test_an_unknown_config_lists_the_known_ones():
    with pytest.raises(ConfigError, match="debug/ctr.*debug/demo"):
        load("debug/nothing")


def test_changed_names_dotted_keys():
    old = load("debug/demo").science
    new = load("debug/demo", ["dreambooth.steps=99", "seeds=[3]", "execution.workers=2"]).science
    assert config.changed(old, new) == ["dreambooth.steps", "seeds"]
