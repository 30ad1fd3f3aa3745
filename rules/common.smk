"""The validated configuration and the names that the rules share."""

import re
from pathlib import Path

from dynatree.ablation import BACKWARD
from dynatree.committed import committed
from dynatree.config import TEXTS, load_config, parse_config
from dynatree.errors import ConfigError, ResultError
from dynatree.failures import failure_path
from dynatree.packed import pack
from dynatree.schema import canonical
from dynatree.sources import PACKAGE, imported_sources, source_digest

# `--config results=<folder>` takes results from there, and nothing is measured here.
TAKEN = config.pop("results", None)

# `--config missing=mark` measures nothing either: tables of the results that are here, in which the
# rows of the others are marked as missing, with the reason.
MARKED = config.pop("missing", None)
if MARKED not in (None, "mark") or (MARKED and TAKEN):
    raise WorkflowError(
        f"--config missing={MARKED}: give missing=mark, without results=, or leave it out"
    )

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


def run_files(names):
    """The result files of runs, once each."""
    return [f"{RUNS}/{STUDY.pair}/{name}.json" for name in dict.fromkeys(names)]


def point_files(experiment):
    """The result files of all points of an experiment; points that measure the same share one."""
    return run_files(STUDY.point_runs(experiment))


if TAKEN:
    try:
        FOUND = committed(STUDY, RESULTS, Path("results/pairs"))
    except ResultError as error:
        raise WorkflowError(str(error)) from None
    for remark in FOUND.remarks:
        logger.warning(f"note: {remark}")
    SECTIONS = FOUND.sections
    PAPER_EXPERIMENTS = EXPERIMENTS = FOUND.experiments
    MEASURED_BY, CERTIFIED_BY = FOUND.source_digest, FOUND.certifying_digest
else:
    SECTIONS = list(STUDY.sections)
    EXPERIMENTS, PAPER_EXPERIMENTS = list(STUDY.experiments), STUDY.paper.experiments
    if MARKED:
        # An experiment is drawn as a whole or not at all.
        EXPERIMENTS = PAPER_EXPERIMENTS = [
            name
            for name in PAPER_EXPERIMENTS
            if all(Path(file).is_file() for file in point_files(name))
        ]
    MEASURED_BY = source_digest(PACKAGE / "measure.py")
    CERTIFIED_BY = source_digest(PACKAGE / "certify.py")
TREES = [f"results/trees/{STUDY.pair}/{name}.json" for name in STUDY.trees.configs]


def one_of(names):
    """A pattern that matches these names and, where there are none, nothing."""
    return "|".join(map(re.escape, names)) or "(?!)"


# What is asked for under another pair's name is measured by changing `pair` in the configuration.
wildcard_constraints:
    section=one_of(SECTIONS),
    experiment=one_of(EXPERIMENTS),
    text=one_of(TEXTS),
    pair=one_of([STUDY.pair]),
    name="[^/]+",


# What every job that loads the pair asks for. On a cluster Snakemake has no cores of its own to
# share out, and inside a job it would see all those of the node.
JOB = STUDY.job
# Jobs that share the host's GPUs share its cores as well.
GPUS = (
    workflow.global_resources["gpu"].value if "gpu" in workflow.global_resources else 1
)
JOB_THREADS = (
    JOB.threads
    if workflow.nodes or workflow.remote_exec
    else max(1, workflow.cores // max(1, GPUS))
)


# What the certificate is to be about. It is made for what is there, where none is to be measured.
CERTIFIED = [
    name
    for name, file in zip(STUDY.measured, run_files(STUDY.measured))
    if not MARKED or Path(file).is_file()
]
CERTIFYING_REST = bool(MARKED and CERTIFIED and not Path(CERTIFICATE).is_file())


def section_runs(section):
    """The results that the tables of a section need, the certificate among them; where missing
    ones are marked, those that are there, and why the others are not."""
    runs = [Path(file) for file in run_files(STUDY.section(section).measured)]
    if not MARKED:
        return [CERTIFICATE, *map(str, runs)]
    found = [run if run.is_file() else failure_path(run) for run in runs]
    certificate = [CERTIFICATE] if CERTIFYING_REST else []
    return certificate + [
        str(path) for path in [Path(CERTIFICATE), *found] if path.is_file()
    ]


ALL_RUNS = sorted(
    {
        *(run for section in SECTIONS for run in section_runs(section)),
        *(run for name in PAPER_EXPERIMENTS for run in point_files(name)),
    }
)


def section_figures(section):
    """The figures of a section; a waterfall needs a table whose rows add something."""
    adding = set(STUDY.sections[section]) - {BACKWARD}
    kinds = ["", "_rounds", "_acceptance", *(["_waterfall"] if adding else [])]
    return [f"paper/figures/{section}{kind}.pdf" for kind in kinds]


# Functions, since Snakemake takes {word} in a plain string, such as in a prompt, for a wildcard.
def whole_study(wildcards):
    """All that the paper depends on, as one string."""
    return STUDY.canonical()


def certificate_spec(wildcards):
    """All that the certificate depends on, as one string."""
    return STUDY.certificate_spec(CERTIFIED).canonical()


def packed_certificate_spec(wildcards):
    """The same as a word of a command line."""
    return pack(certificate_spec(wildcards))


def section_study(wildcards):
    """All that a section of the paper depends on, as one string."""
    return STUDY.section(wildcards.section).canonical()


def packed_section_study(wildcards):
    """The same as a word of a command line."""
    return pack(section_study(wildcards))


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
# The local files that the prompts of the tables' configurations are chosen from.
PROMPT_FILES = sorted({path for name in STUDY.measured for path in STUDY.files(name)})
MEASURING = (
    []
    if TAKEN
    else [
        "scripts/measure.py",
        *imported_sources("scripts/measure.py"),
        *PROMPT_FILES,
    ]
)
CERTIFYING = (
    []
    if TAKEN
    else [
        "scripts/certify.py",
        *imported_sources("scripts/certify.py"),
        *PROMPT_FILES,
    ]
)
RECORDING = [
    "scripts/record_trees.py",
    *imported_sources("scripts/record_trees.py"),
    *PROMPT_FILES,
]
AGGREGATING = [
    "scripts/aggregate.py",
    *imported_sources("scripts/aggregate.py"),
    *MEASURING,
    *CERTIFYING,
    *TRAINING,
]


# The same for the aggregation of an experiment.
AGGREGATING_EXPERIMENT = [
    "scripts/aggregate_experiment.py",
    *imported_sources("scripts/aggregate_experiment.py"),
    *MEASURING,
    *TRAINING,
]


def run_spec(wildcards):
    """All that a measurement depends on, as one string: Snakemake compares it whole."""
    return STUDY.spec(wildcards.name).canonical()


def run_texts(wildcards):
    """The local files that the prompts of a measurement are chosen from."""
    return STUDY.files(wildcards.name)


def experiment_runs(wildcards):
    """The results of all points; points that measure the same share one."""
    return point_files(wildcards.experiment)


def experiment_texts(wildcards):
    """The local files that the prompts of the points are chosen from; none where all was taken."""
    points = [] if TAKEN else STUDY.points(wildcards.experiment)
    return sorted({path for point in points for path in STUDY.files(point.run)})


def experiment_study(wildcards):
    """All that an experiment depends on, as one string."""
    return STUDY.experiment(wildcards.experiment).canonical()


def packed_experiment_study(wildcards):
    """The same as a word of a command line."""
    return pack(experiment_study(wildcards))


def trees_spec(wildcards):
    """All that the recorded trees of a configuration depend on, as one string."""
    return STUDY.trees_spec(wildcards.name).canonical()


def all_trees_specs(wildcards):
    """The same of every configuration that the page shows."""
    return [STUDY.trees_spec(name).canonical() for name in STUDY.trees.configs]


def pair_recipe(wildcards):
    """The recipe of the pair to train, as one string."""
    return canonical(STUDY.pairs[wildcards.pair].recipe.model_dump(mode="json"))


def pair_device(wildcards):
    return STUDY.pairs[wildcards.pair].device
