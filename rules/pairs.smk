"""Training of the embedded pair."""


rule train_pair:
    input:
        script="scripts/train_pair.py",
        sources=imported_sources("scripts/train_pair.py"),
    output:
        "results/pairs/{pair}/training.json",
        "results/pairs/{pair}/target/model.safetensors",
        "results/pairs/{pair}/draft/model.safetensors",
    log:
        "results/logs/train_pair/{pair}.log",
    wildcard_constraints:
        pair=one_of(name for name, models in STUDY.pairs.items() if models.recipe),
    conda:
        "../envs/dynatree.yaml"
    threads: JOB_THREADS
    resources:
        gpu=1,
        busy=STUDY.devices.busy,
        gpu_model=JOB.gpu_model,
        mem_mb=JOB.memory_mb,
        runtime=JOB.minutes,
    params:
        recipe=pair_recipe,
        device=pair_device,
    # Descriptor 3 is the terminal, past the log: see dynatree.progress.
    shell:
        "exec 3>&1; "
        "python {input.script} --recipe {params.recipe:q} --device {params.device} "
        "--threads {threads} --busy {resources.busy} --out results/pairs/{wildcards.pair} 2>&1 | tee {log}"
