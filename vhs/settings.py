"""Every scientific setting, its default, its legal range and where it comes from.

Plain pydantic, no torch: `vhs --help` and a config's validation read this and nothing heavier. jobs/config.py puts the sections together with
the execution settings (backend, resources, caches); what is here changes results, what is there does not.
Units are in the names: _px pixels, _deg degrees; counts are optimizer steps, images or units. Study = the published study this project grew from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, field_validator, model_validator

from vhs.measure import VIEWS


def _known_view(name: str) -> str:
    if name not in VIEWS:
        raise ValueError(f"legal are {', '.join(VIEWS)}")
    return name


_HERE = Path(__file__).resolve().parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"  # as a wheel carries them, or the checkout's
# what a DeepSpeed configuration can say and the section that names it says already
_SAID_ELSEWHERE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler",
    "fp16", "bf16", "torch_autocast",
)  # fmt: skip


def _deepspeed(value: object) -> object:
    """`none`, a file of configs/deepspeed by its name, or any other by its path -> None or the file's content, which is the science."""
    if value in (None, "none"):
        return None
    if isinstance(value, str):
        packaged = {file.stem: file for file in (CONFIGS / "deepspeed").glob("*.json")}
        try:
            value = json.loads(packaged.get(value, Path(value).expanduser()).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"none, {', '.join(sorted(packaged))}, or a DeepSpeed configuration of your own: {value} cannot be read ({error})") from None
    zero = value.get("zero_optimization") if isinstance(value, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (2, 3):
        raise ValueError("a DeepSpeed configuration whose zero_optimization has stage 2 or 3")
    for key in _SAID_ELSEWHERE:
        said = value.get(key, "auto")
        said = said.get("enabled", said) if isinstance(said, dict) else said
        if said != "auto" and said is not False:
            raise ValueError(f"{key} is said by this section's own settings: leave it out of the DeepSpeed configuration, or write auto")
    if auto := [key for key, said in zero.items() if said == "auto"]:
        raise ValueError(f"numbers in zero_optimization: auto ({', '.join(auto)}) goes by a language model's width")
    if "nvme" in [(zero.get(part) or {}).get("device") for part in ("offload_optimizer", "offload_param")]:
        raise ValueError("offload to nvme is not supported: offload to cpu")
    return {key: part for key, part in value.items() if key not in _SAID_ELSEWHERE}


ViewName = Annotated[str, AfterValidator(_known_view)]
Precision = Literal["float32", "float16", "bfloat16"]  # of the networks while they sample; half precision is for GPUs
Solver = Literal["dpm++", "sde-dpm++", "pndm"]  # the second where the model is small or barely taught: it holds images to their prompt more closely
Sharding = Annotated[dict | None, BeforeValidator(_deepspeed)]  # ZeRO on the section's ranks


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _can_be_sharded(section: DreamBooth | Classifier) -> DreamBooth | Classifier:
    if section.sharding and section.mixed_precision == "fp16":
        raise ValueError("sharding does not go with mixed_precision fp16: take bf16 or no")
    return section


class Phantoms(Section):
    """Drawn radiographs that stand in for a data folder when `data: phantoms` (vhs/phantom.py)."""

    count: int = Field(120, ge=12)  # images to split, or with `test_count` those to train on
    test_count: int = Field(0, ge=0)  # further images that are the set's own test part; 0: the test part is drawn from `count`
    style: Literal["textbook", "clinic"] = "clinic"
    seed: int = Field(0, ge=0)
    class_prior: tuple[float, float, float] = (0.15, 0.41, 0.44)  # DogHeart's training set: 208 small, 573 normal, 619 large
    images_per_patient: int = Field(1, ge=1)
    size_px: int = Field(192, ge=64)


class Split(Section):
    """Who trains, who is held out. Stratified by class x source, grouped by patient, drawn once (vhs/split.py)."""

    seed: int = 137
    test_fraction: float = Field(0.25, gt=0, lt=1)
    inner_fraction: float = Field(0.1, gt=0, lt=0.5)  # of the training patients: schedulers and thresholds, never a reported figure
    duplicate_bits: int = Field(24, ge=0, le=64)  # of 256: images no further apart are one image (vhs/duplicates.py has the measurements)
    folds: int = Field(0, ge=0)  # 0: test split only; k >= 2: k-fold over everything that is not test, one generator and labeller a fold
    test_sources: tuple[str, ...] = ()  # every image of these is the test part, all others train: what is learnt at one clinic, judged at another
    training_fraction: float = Field(1.0, gt=0, le=1)  # of each scope's training patients (0.25's are among 0.5's); nothing else is taught or tuned with


class Labeller(Section):
    """The key-point network that measures images (vhs/labelling.py)."""

    init: str = "packaged"  # packaged | scratch | a labeller folder, also s3://…
    size_px: int = Field(128, ge=32, multiple_of=16)
    steps: int = Field(200, ge=0)  # fine-tuning on this run's training images; 0 uses `init` as it is
    batch: int = Field(24, ge=1)  # global
    ranks: int = Field(1, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    passes: int = Field(8, ge=1)  # MC-dropout passes behind `spread`, frozen batch norm, masks seeded by key
    keep_quantile: float = Field(0.99, gt=0.5, le=1)  # verdict thresholds sit at this quantile of the training images' own values
    slack: float = Field(1.5, ge=1)  # times this: generated images are smoother than film, and strange ones lie several times beyond
    seed: int = 137


class Priors(Section):
    """Class images for prior preservation, drawn by the base model (DreamBooth, Ruiz et al. 2023, section 3.2). Study: 200."""

    images: int = Field(200, ge=3)  # of all classes together
    solver: Solver = "dpm++"
    steps: int = Field(20, ge=1)
    guidance: float = Field(1.0, ge=1)  # what the base knows, not an exaggeration of it
    batch: int = Field(4, ge=1)  # study: sample_batch_size=4
    precision: Precision = "float32"
    seed: int = 137


class Concept(Section):
    """One entry of the field's concepts_list.json: the prompts of a class (vhs/prompts.py says of which)."""

    instance_prompt: str
    class_prompt: str
    instance_data_dir: str  # its last folder names the class; the images themselves are those of the run's own split
    class_data_dir: str | None = None  # class images found there (also s3://…) are used before any is drawn


class DreamBooth(Section):
    """Fine-tuning of the base model on this run's training images; defaults are the study's Figure 1 but for what a CPU cannot do."""

    token: str = "sks"  # may name {size} {subject} {source} itself, for a template that names the class by its token alone
    # prompts may name {token} {size} {subject} {source}; study: without {size} {subject}, its token named the class and it had only dogs
    instance_prompt: str = "photo of {token} {size} {subject} heart Cardiovascular Thoracic radiograph x-ray"
    class_prompt: str = "photo of {size} {subject} heart Cardiovascular Thoracic radiograph x-ray"
    concepts: tuple[Concept, ...] = ()  # in place of both prompts: a concepts_list.json, or its entries
    prior_loss_weight: float = Field(1.0, ge=0)
    steps: int = Field(5000, ge=1)
    batch: int = Field(2, ge=1)  # global, instance images a forward pass; as many class images beside them
    gradient_accumulation: int = Field(1, ge=1)  # forward passes a step
    gradient_checkpointing: bool = False  # a third more time for a fraction of the memory; changes no result
    ranks: int = Field(1, ge=1)
    sharding: Sharding = None  # none | zero2 | zero3 | zero2_offload | zero3_offload (configs/deepspeed) | a JSON file of your own
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # study: 8 bits, which need a GPU
    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    min_snr_gamma: float | None = None
    lora_rank: int = Field(0, ge=0)  # of adapters beside the attention projections, merged when done; 0: every weight is trained
    ema_decay: float | None = Field(None, gt=0, lt=1)  # null: the last weights are the generator's
    train_text_encoder: bool = False
    cache_latents: bool = True  # each instance image passes the codec once; 64 KiB an image at 512 px; changes no result
    prompt_dropout: float = Field(
        0.1, ge=0, lt=1
    )  # share of instance prompts replaced by the empty prompt, so that guidance keeps its meaning
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 137

    @model_validator(mode="after")
    def _has_moments_to_share(self) -> DreamBooth:
        if self.sharding and self.optimizer == "adamw_8bit":
            raise ValueError("sharding does not go with optimizer adamw_8bit: take adamw, whose moments are shared out over the ranks")
        return _can_be_sharded(self)

    @field_validator("concepts", mode="before")
    @classmethod
    def _read_concepts(cls, value: object) -> object:
        """A file's content, not its name, is the science."""
        if not isinstance(value, str):
            return value or ()
        try:
            return json.loads(Path(value).expanduser().read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{value} cannot be read as a concepts_list.json ({error})") from None


class Prompts(Section):
    """Prompts to try before images are generated, against the one DreamBooth is taught with (jobs/stages/prompts.py)."""

    candidates: tuple[str, ...] = ()  # templates as dreambooth.instance_prompt; none: nothing is tried
    images: int = Field(16, ge=4)  # of each class, for each prompt
    seed: int = 137


class Generation(Section):
    """Images by number: unit n of a prompted class is images [n unit_images, (n + 1) unit_images), drawn in rounds until the quota is met.

    By source, a class is drawn and counted for each source of the training images: where the scanner alone tells much of the class, a classifier
    would learn the scanner from generated images that leave it open.
    """

    solver: Solver = "dpm++"
    steps: int = Field(20, ge=1)
    guidance: float = Field(2.0, ge=1)
    batch: int = Field(16, ge=1)
    precision: Precision = "float32"
    unit_images: int = Field(64, ge=1)
    round_units: int = Field(4, ge=1)  # units of each prompted class still short of its quota, a round
    max_rounds: int = Field(4, ge=1)
    quota: int = Field(150, ge=1)  # accepted images of each MEASURED class, or class and source
    by_source: bool = False  # prompts must name {source}
    seed: int = 137


class Classifier(Section):
    """The timm classifier and how every arm trains it. Study: unfreeze 3, plateau, randaugment 9; else as here."""

    model: str = "tf_efficientnet_b7"  # any timm model, with a tag if wanted: tf_efficientnet_b7.ns_jft_in1k
    weights: str = "imagenet"  # imagenet (those of the model's timm tag) | scratch | a folder holding model.safetensors, also s3://…
    size_px: int = Field(600, ge=32)
    head_hidden: int = Field(7, ge=0)  # hidden Linear + ReLU layers before the last one (study: "7 Linear Layers")
    drop_rate: float = Field(0.5, ge=0, lt=1)
    unfreeze: Literal["all"] | NonNegativeInt = "all"  # or how many last stages (timm's grouping) train with the head
    epochs: int = Field(30, ge=1)  # over the arm's own images; real-matched and pretrain take mixed's steps
    batch: int = Field(16, ge=1)  # global
    ranks: int = Field(1, ge=1)
    sharding: Sharding = None  # as DreamBooth's
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "plateau"] = "cosine"  # plateau: ReduceLROnPlateau on the inner validation's loss, looked at every epoch
    plateau_patience: int = Field(5, ge=0)  # epochs without a better loss before the rate falls
    plateau_factor: float = Field(0.1, gt=0, lt=1)
    keep: Literal["last", "best_inner"] = "last"  # the last weights, or those of the least inner validation loss
    weight_decay: float = Field(0.01, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["none", "balanced"] = "none"  # of the loss; balanced: the inverse of the class counts that the arm draws
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # of training, not of the answers; fp16 on GPUs alone
    class_prior: Literal["balanced", "natural"] = "balanced"  # of every arm but real, the same for both origins; real keeps its own
    pretrain_share: float = Field(0.5, gt=0, lt=1)  # of the arm pretrain's steps: on generated images, the rest on real ones
    rotation_deg: float = Field(10.0, ge=0, le=45)
    zoom: float = Field(0.1, ge=0, lt=0.5)  # isotropic, both ways
    shift: float = Field(0.05, ge=0, lt=0.5)  # of the image side
    flip: bool = True
    gamma: float = Field(0.2, ge=0, lt=1)  # exponent drawn in [1 - gamma, 1 / (1 - gamma)]
    randaugment: int = Field(0, ge=0, le=10)  # magnitude; 0: off (vhs/augmentation.py says what is left for grey)
    randaugment_ops: int = Field(2, ge=1)  # operations an image, each taken with probability 1/2 as timm does

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Classifier:
        return _can_be_sharded(self)


class Report(Section):
    """What the report needs beside the run's own products."""

    inception: str | None = None  # weights of the FID's Inception (vhs/inception.py): its features judge likeness; null: the labeller's do


class Pretraining(Section):
    """The small Stable Diffusion that ships with the package, trained from nothing on phantoms (vhs/pretraining.py, `vhs pretrain`)."""

    views: tuple[ViewName, ...] = ("canine_lateral", "human_frontal")
    phantoms_per_view: int = Field(8000, ge=16)
    first_phantom_seed: int = Field(10_000_000, ge=0)  # far from Phantoms.seed: no run's data repeats the base's phantoms
    resolution_px: int = Field(128, ge=32, multiple_of=32)
    phantoms_px: tuple[int, ...] = ()  # sides that phantoms are drawn at, in turn, before they are scaled to resolution_px; none: that one
    codec_channels: tuple[int, ...] = (16, 32, 64, 64)  # one level each, so 8 times smaller latents
    codec_steps: int = Field(5000, ge=0)
    codec_batch: int = Field(16, ge=4)
    codec_crop_px: int = Field(64, ge=32, multiple_of=32)
    codec_learning_rate: float = Field(1e-3, gt=0)
    codec_head_start: float = Field(0.4, ge=0, le=1)  # share of the steps with the decoder on the linear targets, not the encoder's latents
    unet_channels: tuple[int, ...] = (48, 96, 176)
    text_width: int = Field(96, ge=32)
    text_layers: int = Field(2, ge=1)
    steps: int = Field(4000, ge=0)  # of the denoiser, on the linear targets
    adapt_steps: int = Field(6500, ge=0)  # of the denoiser, on the codec's own latents
    labeller_steps: int = Field(4500, ge=0)  # of each view's key-point network; 0: none is made
    labeller_learning_rate: float = Field(4e-3, gt=0)
    batch: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    min_snr_gamma: float | None = (
        None  # none: the heart's size is settled at noise levels that min-SNR all but switches off for v-prediction
    )
    noise_exponent: float = Field(1.0, gt=0, le=1)  # noise levels are u ** this: below 1 they lean to high ones, where the heart's size is settled
    prompt_dropout: float = Field(0.1, ge=0, lt=1)
    ema_decay: float = Field(0.999, gt=0, lt=1)
    mixed_precision: Literal["no", "bf16"] = "no"  # bf16 pays on a GPU, and a quarter on a CPU with AVX512-BF16
    seed: int = 137
