"""Predictions in, figures with honest intervals out: no file is read or written here.

    predictions.py     the table that every figure is computed from: its columns, its arms, which of its rows are judged
    intervals.py       accuracy, balanced accuracy and the paired difference, each with its interval
    classification.py  where a classifier is right, what it mistakes for what, how well it ranks and how well it is calibrated
    measurement.py     how well the labeller measures: mean absolute error, Bland & Altman's limits
    gain.py            what a person's corrections of generated images changed
    generated.py       what was asked, produced, accepted, and why not
    likeness.py        how generated images differ from real ones: Fréchet distance, a probe's AUROC
    memorisation.py    whether they lie nearer to the images that their generator learnt from than to others like them
    evaluator.py       the files that the field's evaluators read
    summary.py         the run's figures in one dictionary, and the verdict in one sentence
    record.py          a scope's predictions as a small text, which outlives the run
    study.py           what the records of several runs say together; worth.py: generated images in labelled ones
"""

from vhs.metrics.classification import accuracy_by, auroc, calibration_error, confusion, near_boundary, tables
from vhs.metrics.evaluator import EVALUATOR_ORDER, evaluator_csv
from vhs.metrics.gain import gain_by_corrections
from vhs.metrics.generated import generated_by_index, generated_counts, generated_tables, ranked_prompts
from vhs.metrics.intervals import accuracy, balanced_accuracy, detectable, minimum_detectable, paired_difference
from vhs.metrics.likeness import frechet_by_class, frechet_distance, probe_auroc
from vhs.metrics.measurement import bland_altman, labeller_quality, measurement_by
from vhs.metrics.memorisation import distances_by_class, nearest
from vhs.metrics.predictions import HELD_OUT, NO_SEED, UNLABELLED, VALIDATION, joined_once, judged
from vhs.metrics.summary import summary, verdict

__all__ = [
    "EVALUATOR_ORDER", "HELD_OUT", "NO_SEED", "UNLABELLED", "VALIDATION", "accuracy", "accuracy_by", "auroc", "balanced_accuracy", "bland_altman",
    "calibration_error", "confusion", "detectable", "distances_by_class", "evaluator_csv", "frechet_by_class", "frechet_distance",
    "gain_by_corrections", "generated_by_index", "generated_counts", "generated_tables", "joined_once", "judged", "labeller_quality",
    "measurement_by", "minimum_detectable", "near_boundary", "nearest", "paired_difference", "probe_auroc", "ranked_prompts", "summary", "tables",
    "verdict",
]  # fmt: skip
