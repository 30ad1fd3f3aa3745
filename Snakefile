# From config.yaml to a section of the paper: train the embedded pair if it is the one in use, measure
# every configuration that its tables need, one GPU job each, aggregate, render.

from snakemake.utils import min_version

min_version("9.19")


configfile: "config.yaml"


include: "rules/common.smk"


if not (TAKEN or MARKED):

    include: "rules/pairs.smk"
    include: "rules/measure.smk"
    include: "rules/trees.smk"


if CERTIFYING_REST or not (TAKEN or MARKED):

    include: "rules/certify.smk"


include: "rules/experiments.smk"
include: "rules/paper.smk"
include: "rules/targets.smk"


localrules:
    all,
    aggregate,
    aggregate_experiment,
    experiment_text,
    experiment_figure,
    section_text,
    section_figure,
    paper_text,
    manifest,
    section_detail,
    roofline_figure,
    rendered,
    paper,
    tree_page,


# The runs are listed beside what is made of them, so that a removed result is noticed.
rule all:
    default_target: True
    input:
        section_runs(SECTIONS[0]),
        f"paper/{SECTIONS[0]}.tex",
        f"paper/figures/{SECTIONS[0]}.pdf",
