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
            point_files(name),
            [f"results/experiments/{name}.json", f"results/experiments/{name}.csv"],
            f"paper/experiments/{name}.tex",
            [
                f"paper/figures/experiments/{name}.pdf",
                f"paper/figures/experiments/{name}.png",
            ],
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
