"""Experiments: the runs of all points of a grid, aggregated into one file; a target for each."""


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
    localrule: True
    conda:
        "../envs/dynatree.yaml"
    params:
        study=experiment_study,
        packed=packed_experiment_study,
        source_digest=source_digest(PACKAGE / "measure.py"),
    shell:
        "python {input.script} --config {params.packed} --experiment {wildcards.experiment} "
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
            expand(
                "results/experiments/{experiment}.{kind}",
                experiment=experiment,
                kind=["json", "csv"],
            ),
        localrule: True
