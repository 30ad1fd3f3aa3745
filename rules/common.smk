"""The validated configuration and the names that the rules share."""

from dynatree.config import canonical, load_config, parse_config
from dynatree.errors import ConfigError
from dynatree.sources import PACKAGE, imported_sources, source_digest

try:
    # Snakemake reads YAML without noticing a key that is given twice.
    for path in workflow.configfiles:
        load_config(path)
    STUDY = parse_config(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

PAIR_FOLDER = f"results/pairs/{STUDY.pair}"
CERTIFICATE = "results/certificate.json"
SECTIONS = list(STUDY.sections)
TREES = [f"results/trees/{STUDY.pair}/{name}.json" for name in STUDY.trees.configs]


wildcard_constraints:
    section="|".join(SECTIONS),


def section_runs(section):
    """The results that the tables of a section need, the certificate among them."""
    names = STUDY.section(section).measured
    return [CERTIFICATE, *(f"results/runs/{STUDY.pair}/{name}.json" for name in names)]


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
    if STUDY.pair_spec.recipe
    else []
)

# Snakemake records the new facts of a job even when the job fails, and a missing intermediate file
# is no reason to run. So every rule lists what the rules before it are made of as well.
TRAINING = (
    ["scripts/train_pair.py", *imported_sources("scripts/train_pair.py")]
    if PAIR_FILES
    else []
)
MEASURING = ["scripts/measure.py", *imported_sources("scripts/measure.py")]
CERTIFYING = ["scripts/certify.py", *imported_sources("scripts/certify.py")]
RECORDING = ["scripts/record_trees.py", *imported_sources("scripts/record_trees.py")]
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


def trees_spec(wildcards):
    """All that the recorded trees of a configuration depend on, as one string."""
    return STUDY.trees_spec(wildcards.name).canonical()


def pair_recipe(wildcards):
    """The recipe of the pair to train, as one string."""
    return canonical(STUDY.pairs[wildcards.pair].recipe.model_dump(mode="json"))


def pair_device(wildcards):
    return STUDY.pairs[wildcards.pair].device
