"""What a person's corrections changed in the figures: an arm's answers stay in the run when it is trained again, beside those it gives since."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.stages.evaluate import FOLDER
from jobs.unit import Marker, read_marker
from vhs.arms import REAL

if TYPE_CHECKING:
    import pandas as pd



def earlier(run, now: list[str]) -> list[str]:
    """Predictions of a run that are none of those `now`."""
    return sorted({*run.under(f"{FOLDER}/")} - {*now})


@dataclass(frozen=True)
class Training:
    """A classifier that judged the held-out images: its arm, scope and seed, the tables of corrections that it was trained with, and its predictions, None
    for those that stand."""

    arm: str
    scope: str
    seed: int
    said: tuple[str, ...]
    answers: pd.DataFrame | None = None

    @classmethod
    def of(cls, classifier: Marker, answers: pd.DataFrame | None = None) -> Training:
        facts, said = classifier.facts, classifier.inputs.get("corrections", [])
        return cls(facts["arm"], facts["scope"], facts["seed"], tuple(name for name, _ in said), answers)

    @property
    def place(self) -> tuple[str, str, int]:
        return self.arm, self.scope, self.seed


def trainings(inputs) -> list[Training]:
    """Those that do not stand, which knew fewer corrections or others, then those that do. `inputs`: the report's."""
    from shards import manifest

    now, then = [Training.of(marker) for marker in inputs.markers("classifiers")], []
    said = {one.place: one.said for one in now}
    for marker in inputs.markers("earlier"):
        table = manifest.read(inputs.storage, marker.path)
        for path in json.loads(manifest.metadata(table)["unit"])["inputs"].get("classifier", []):
            one = Training.of(read_marker(inputs.storage, path), table.to_pandas())
            then += [one] if one.said != said.get(one.place) else []
    return [*sorted(then, key=lambda one: len(one.said)), *now]


def judged_before(found: list[Training]) -> list[str]:
    """Scopes whose held-out images had been judged before generated labels were corrected."""
    return sorted({one.scope for one in found if one.answers is not None})


def answers(config, storage, found: list[Training], predictions: pd.DataFrame) -> pd.DataFrame:
    """What metrics.gain_by_corrections wants, of every arm that mixes in generated images. `predictions`: those that stand.

    Only words on the arm's own images count as corrected: a control is trained again too where mixed has other numbers of images by a person's words.
    """
    import pandas as pd

    from jobs import generators, labels

    standing = dict(list(predictions.groupby(["arm", "scope", "seed"])))
    kept = {}  # in the order of `found`: what stands comes last
    for one in (one for one in found if one.arm not in REAL):
        own = labels.folder(one.scope, generators.of_arm(config, one.arm))
        images = labels.read(storage, [path for path in one.said if path.startswith(own)]).key.nunique()
        after = max(map(labels.number, one.said), default=0)
        rows = standing[one.place] if one.answers is None else one.answers
        kept[*one.place, after] = rows.assign(after=after, corrected=images)
    return pd.concat(kept.values(), ignore_index=True)
