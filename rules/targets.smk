"""A target for each section and each experiment: `snakemake families`, `snakemake main`."""

TARGETS = {
    **{
        ("sections", section): [
            section_runs(section),
            f"paper/{section}.tex",
            section_figures(section),
        ]
        for section in SECTIONS
    },
    **{
        ("experiments", name): [
            run_files(point.run for point in STUDY.points(name)),
            expand(rules.aggregate_experiment.output, experiment=name),
            expand(rules.experiment_text.output, experiment=name),
            expand(rules.experiment_figure.output, experiment=name),
        ]
        for name in EXPERIMENTS
    },
}

for (kind, target), files in TARGETS.items():
    if target in ("all", *(rule.name for rule in workflow.rules)):
        raise WorkflowError(
            f"{kind}.{target}: is the name of a rule; choose another name"
        )

    # The runs are listed beside what is made of them, so that a removed result is noticed.
    rule:
        name:
            target
        input:
            files,
        localrule: True
