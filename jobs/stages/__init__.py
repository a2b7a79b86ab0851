"""The stages, in the order of one image's way: read top to bottom.

Each is a module with
    NAME, FOLDER   what it is called, and where in the run its products go
    SCIENCE        the sections of the configuration it reads: they are part of its units' identity
    AFTER          the stages whose products it reads
    KIND           "parquet" (a shard or a table) or "json" (files): the kind of marker its units leave
    TORCH          whether its results are torch's: then threads and determinism are set before it works
    units(run)     the units that can be named now; Run.named asks in order, so every stage before is done with its own
    work(config, inputs, output) -> Files | Shard | Table     one unit's work: plain, importable, heavy imports inside
"""

from jobs.stages import dreambooth, evaluate, generate, ingest, label, labeller, priors, prompts, report, split, train

STAGES = (
    ingest,  # files as users bring them -> grey, letterboxed, in shards, with class and key points        real/
    split,  # who trains, who is held out: stratified, grouped by patient, once                            splits-*.parquet
    labeller,  # a key-point network that measures images, fine-tuned on a scope's training images         labeller/
    priors,  # class images drawn by the base model, for prior preservation                                priors/
    dreambooth,  # the base model fine-tuned on a scope's training images                                  generator/
    prompts,  # where candidates are given: the one that draws best, by the scope's own labeller                prompts/
    generate,  # image number i of a prompted class from seed i, in units, in rounds                       generated/
    label,  # each generated image measured: index, class, spread, verdict with reason                     labels/
    train,  # a timm classifier for each arm, scope and seed                                               classifier/
    evaluate,  # its predictions on the held-out images, each once                                         predictions/
    report,  # the verdict with its interval, and what it rests on                                         report/
)
BY_NAME = {stage.NAME: stage for stage in STAGES}
