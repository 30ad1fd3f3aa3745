# From config.yaml to paper/ablation.tex: train the embedded pair if it is the one in use, measure
# every configuration that a table needs, one GPU job each, aggregate, render.

from snakemake.utils import min_version

min_version("9.19")


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/pairs.smk"
include: "rules/measure.smk"
include: "rules/paper.smk"


localrules:
    all,
    aggregate,
    ablation_table,
    ablation_figure,
    paper,


# The runs are listed beside what is made of them, so that a removed result is noticed.
rule all:
    default_target: True
    input:
        RUNS,
        "paper/ablation.tex",
        "paper/figures/ablation.pdf",
