"""Which diffusers models can be taught and drawn with here, told by their configurations alone: before gigabytes are downloaded, and without torch."""

from __future__ import annotations

LEGAL = (
    "legal is a text-to-image model of the kind of Stable Diffusion 1.x or 2.x: a StableDiffusionPipeline with one text encoder, whose UNet takes "
    "latents and text alone and predicts epsilon or v_prediction"
)
PIPELINE = "StableDiffusionPipeline"
PREDICTIONS = ("epsilon", "v_prediction")
_MORE_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")  # of the UNet, beside latents and text


def unsupported(index: dict, unet: dict, scheduler: dict) -> str:
    """What of a model cannot be used, and what can; "" where nothing speaks against it.

    `index`, `unet`, `scheduler`: its model_index.json, unet/config.json and scheduler/scheduler_config.json.
    """
    found = []
    if (pipeline := index.get("_class_name", PIPELINE)) != PIPELINE:
        found.append(f"it is a {pipeline}")
    found += [f"it has a {part}" for part in ("text_encoder_2", "text_encoder_3", "transformer") if (index.get(part) or [None])[0]]
    if (channels := unet.get("in_channels", 4)) != (out := unet.get("out_channels", 4)):  # inpainting, depth, upscaling, instructions
        found.append(f"its UNet takes {channels} channels for {out} of latents")
    found += [f"its UNet has the {name} {unet[name]!r}" for name in _MORE_INPUTS if unet.get(name) is not None]
    if (predicts := scheduler.get("prediction_type", "epsilon")) not in PREDICTIONS:
        found.append(f"its scheduler has the prediction_type {predicts!r}")
    return f"{', '.join(found)}; {LEGAL}" if found else ""
