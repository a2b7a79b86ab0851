"""configs/paper.yaml says what the study's Figure 1 says, flag by flag, and plans what its text names."""

from __future__ import annotations

import re
import shlex

import pytest

from jobs import config, models
from jobs.stages import BY_NAME
from vhs.measure import CLASSES
from vhs.prompts import class_prompt, instance_prompt
from vhs.split import scopes

FIGURE_1 = r"""
accelerate launch train_dreambooth.py \
--pretrained_model_name_or_path=$MODEL_NAME \
--instance_data_dir=$INSTANCE_DIR \
--class_data_dir=$CLASS_DIR \
--output_dir=$OUTPUT_DIR \
--with_prior_preservation --prior_loss_weight=1.0 \
--instance_prompt="photo of ${TOKEN_NAME} Cardiovascular Thoracic radiograph x-ray" \
--class_prompt="photo of Cardiovascular Thoracic radiograph x-ray" \
--seed=137 \
--resolution=512 \
--train_batch_size=2 \
--mixed_precision="fp16" \
--use_8bit_adam \
--gradient_accumulation_steps=1 \
--learning_rate=5e-05 \
--lr_scheduler="cosine" \
--lr_warmup_steps=0 \
--num_class_images=200 \
--sample_batch_size=4 \
--max_train_steps=5000
"""
OF_THE_RUN = {BY_NAME["priors"]: "$CLASS_DIR", BY_NAME["dreambooth"]: "$OUTPUT_DIR"}  # folders of the run itself
A_NAME, ANOTHER = "data/somewhere", "models/elsewhere"


@pytest.fixture(scope="module")
def paper():
    return config.load("paper")


def flags() -> dict[str, str | bool]:
    """Figure 1's flags and values as a shell would give them, its variables left as they are."""
    words = shlex.split(FIGURE_1.replace("\\\n", " "))[3:]
    pairs = [word.removeprefix("--").partition("=") for word in words]
    return {name: value if equals else True for name, equals, value in pairs}


def test_every_flag_of_figure_1_is_in_the_configuration(paper):
    dreambooth, token = paper.dreambooth, "sks large"
    said = {
        "pretrained_model_name_or_path": "$MODEL_NAME" if config.load("paper", [f"base={ANOTHER}"]).base == ANOTHER else None,
        "instance_data_dir": "$INSTANCE_DIR" if config.load("paper", [f"data={A_NAME}"]).data == A_NAME else None,
        **{{"priors": "class_data_dir", "generator": "output_dir"}[stage.FOLDER]: folder for stage, folder in OF_THE_RUN.items()},
        "with_prior_preservation": dreambooth.prior_loss_weight > 0,
        "prior_loss_weight": str(dreambooth.prior_loss_weight),
        "instance_prompt": instance_prompt(dreambooth, paper.measure, "large").replace(token, "${TOKEN_NAME}"),
        "class_prompt": class_prompt(dreambooth, paper.measure, "large"),
        "seed": str(dreambooth.seed),
        "resolution": str(paper.resolution),
        "train_batch_size": str(dreambooth.batch),
        "mixed_precision": dreambooth.mixed_precision,
        "use_8bit_adam": dreambooth.optimizer == "adamw_8bit",
        "gradient_accumulation_steps": str(dreambooth.gradient_accumulation),
        "learning_rate": f"{dreambooth.learning_rate:.0e}",
        "lr_scheduler": dreambooth.schedule,
        "lr_warmup_steps": str(dreambooth.warmup_steps),
        "num_class_images": str(paper.priors.images),
        "sample_batch_size": str(paper.priors.batch),
        "max_train_steps": str(dreambooth.steps),
    }
    assert len(flags()) == 20 and said == flags()
    assert dreambooth.ranks == 1, "the script's batch is a device's, ours is the whole"


def test_what_figure_1_leaves_out_is_off(paper):
    dreambooth = paper.dreambooth
    assert not (dreambooth.train_text_encoder or dreambooth.gradient_checkpointing or dreambooth.lora_rank or dreambooth.prompt_dropout)
    assert dreambooth.ema_decay is None and dreambooth.min_snr_gamma is None and not dreambooth.concepts
    assert (dreambooth.weight_decay, dreambooth.max_grad_norm) == (0.01, 1.0), "the script's defaults"


def test_tokens_tell_the_classes_apart(paper):
    assert len({instance_prompt(paper.dreambooth, paper.measure, name) for name in CLASSES}) == 3
    assert len({class_prompt(paper.dreambooth, paper.measure, name) for name in CLASSES}) == 1


def test_quota_folds_and_the_ceiling_of_candidates(paper):
    generation, judged = paper.generation, scopes(paper.split)
    assert generation.quota == 1500 and paper.split.folds == 7 and len(judged) == 8
    candidates = len(judged) * len(CLASSES) * generation.max_rounds * generation.round_units * generation.unit_images
    assert len(judged) * len(CLASSES) * generation.quota <= candidates <= 100_000


def test_the_classifier_is_the_study_s(paper):
    said = paper.classifier
    assert (said.model, said.head_hidden, said.drop_rate, said.size_px, said.batch) == ("tf_efficientnet_b7", 7, 0.5, 600, 16)
    assert (said.learning_rate, said.weight_decay, said.schedule, said.unfreeze, said.randaugment) == (1e-3, 0.01, "plateau", 3, 9)


@pytest.mark.parametrize("name", ["paper", "one_gpu"])
def test_the_base_is_pinned_to_a_commit(name):
    chosen = config.load(name)
    assert re.fullmatch(r"stable-diffusion-v1-5/stable-diffusion-v1-5@[0-9a-f]{40}", models.base(chosen))
    assert models.base(chosen) == models.fingerprint(models.base(chosen))


def test_every_deviation_is_said_where_it_stands():
    said = [line for line in config.find("paper").read_text().splitlines() if "deviates:" in line]
    for what in ("letterboxed", "runwayml", "folds", "labeller", "tokens", "batches", "by eye", "inner validation", "shear"):
        assert any(what in line for line in said), what
