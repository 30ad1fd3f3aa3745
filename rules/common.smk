"""The validated configuration and the names that the rules share."""

from pathlib import Path

from dynatree.ablation import BACKWARD
from dynatree.committed import committed
from dynatree.config import canonical, load_config, parse_config
from dynatree.errors import ConfigError, ResultError
from dynatree.sources import PACKAGE, imported_sources, source_digest

# `--config results=<folder>` takes results from there, and nothing is measured here.
TAKEN = config.pop("results", None)

try:
    # Snakemake reads YAML without noticing a key that is given twice.
    for path in workflow.configfiles:
        load_config(path)
    STUDY = parse_config(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

PAIR_FOLDER = f"results/pairs/{STUDY.pair}"
RESULTS = Path(TAKEN or "results")
RUNS = f"{RESULTS}/runs"
CERTIFICATE = f"{RESULTS}/certificate.json"

if TAKEN:
    try:
        FOUND = committed(STUDY, RESULTS, Path("results/pairs"))
    except ResultError as error:
        raise WorkflowError(str(error)) from None
    for remark in FOUND.remarks:
        logger.warning(f"note: {remark}")
    SECTIONS = FOUND.sections
    MEASURED_BY, CERTIFIED_BY = FOUND.source_digest, FOUND.certifying_digest
else:
    SECTIONS = list(STUDY.sections)
    MEASURED_BY = source_digest(PACKAGE / "measure.py")
    CERTIFIED_BY = source_digest(PACKAGE / "certify.py")


wildcard_constraints:
    section="|".join(SECTIONS),


def section_runs(section):
    """The results that the tables of a section need, the certificate among them."""
    names = STUDY.section(section).measured
    return [CERTIFICATE, *(f"{RUNS}/{STUDY.pair}/{name}.json" for name in names)]


def section_figures(section):
    """The figures of a section; a waterfall needs a table whose rows add something."""
    adding = set(STUDY.sections[section]) - {BACKWARD}
    kinds = ["", "_rounds", "_acceptance", *(["_waterfall"] if adding else [])]
    return [f"paper/figures/{section}{kind}.pdf" for kind in kinds]


def section_study(wildcards):
    """All that a section of the paper depends on, as one string."""
    return STUDY.section(wildcards.section).canonical()


# A trained pair is an input of every measurement; downloaded and local models are not built here.
PAIR_FILES = (
    [
        f"{PAIR_FOLDER}/training.json",
        f"{PAIR_FOLDER}/target/model.safetensors",
        f"{PAIR_FOLDER}/draft/model.safetensors",
    ]
    if STUDY.pair_spec.recipe and not TAKEN
    else []
)

# Snakemake records the new facts of a job even when the job fails, and a missing intermediate file
# is no reason to run. So every rule lists what the rules before it are made of as well. What was
# taken is made of nothing here.
TRAINING = (
    ["scripts/train_pair.py", *imported_sources("scripts/train_pair.py")]
    if PAIR_FILES
    else []
)
MEASURING = (
    [] if TAKEN else ["scripts/measure.py", *imported_sources("scripts/measure.py")]
)
CERTIFYING = (
    [] if TAKEN else ["scripts/certify.py", *imported_sources("scripts/certify.py")]
)
AGGREGATING = [
    "scripts/aggregate.py",
    *imported_sources("scripts/aggregate.py"),
    *MEASURING,
    *CERTIFYING,
    *TRAINING,
]


def run_spec(wildcards):
    """All that a measurement depends on, as one string: Snakemake compares it whole."""
    return STUDY.spec(wildcards.name).canonical()


def pair_recipe(wildcards):
    """The recipe of the pair to train, as one string."""
    return canonical(STUDY.pairs[wildcards.pair].recipe.model_dump(mode="json"))


def pair_device(wildcards):
    return STUDY.pairs[wildcards.pair].device
