"""Experiments: the runs of all points of a grid, aggregated into one file; a target for each."""


def experiment_runs(wildcards):
    """The results of all points; points that measure the same share one."""
    return run_files(point.run for point in STUDY.points(wildcards.experiment))


def experiment_texts(wildcards):
    """The local files that the prompts of the points are chosen from."""
    points = STUDY.points(wildcards.experiment)
    return sorted({path for point in points for path in STUDY.files(point.run)})


def experiment_study(wildcards):
    """All that an experiment depends on, as one string."""
    return STUDY.experiment(wildcards.experiment).canonical()


rule aggregate_experiment:
    input:
        script="scripts/aggregate_experiment.py",
        sources=imported_sources("scripts/aggregate_experiment.py"),
        measured_by=MEASURING,
        trained_by=TRAINING,
        texts=experiment_texts,
        runs=experiment_runs,
    output:
        json="results/experiments/{experiment}.json",
        csv="results/experiments/{experiment}.csv",
    log:
        "results/logs/aggregate_experiment/{experiment}.log",
    conda:
        "../envs/dynatree.yaml"
    localrule: True
    params:
        study=experiment_study,
        source_digest=source_digest(PACKAGE / "measure.py"),
    shell:
        "python {input.script} --config {params.study:q} --experiment {wildcards.experiment} "
        "--source-digest {params.source_digest} --results results/runs --json {output.json} "
        "--csv {output.csv} 2>&1 | tee {log}"


for experiment in STUDY.experiments:
    if experiment in ("all", *(rule.name for rule in workflow.rules)):
        raise WorkflowError(
            f"experiments.{experiment}: is the name of a rule; choose another name"
        )

    # The runs are listed beside what is made of them, so that a removed result is noticed.
    rule:
        name:
            experiment
        input:
            run_files(point.run for point in STUDY.points(experiment)),
            expand(rules.aggregate_experiment.output, experiment=experiment),
        localrule: True
