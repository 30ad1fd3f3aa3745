"""What must become of a mutant, whatever it is: a valid reading, or one clear error."""

import json
import signal
from collections import Counter
from contextlib import contextmanager

import mutants
import synthetic
import yaml

from dynatree.ablation import read_ablation, write_ablation
from dynatree.aggregate import aggregate
from dynatree.certificate import read_certificate, write_certificate
from dynatree.config import load_config, parse_config
from dynatree.errors import ConfigError, ResultError
from dynatree.facts import SEAL, sealed
from dynatree.results import read_result, write_result
from dynatree.strategies import MAX_NODES

LIMIT_S = 8.0
"""Processor seconds that one mutant may take."""

CONFIG = """
pair: micro
pairs:
  micro:
    recipe: {target: {layers: 2, width: 32, heads: 2}, draft: {layers: 1, width: 16, heads: 2},
             target_steps: 2, rollouts: 4, draft_steps: 2}
    measure: {runs: 2}
    strategies: {tree: {depth: 3}}
  local: {target: {path: a}, draft: {hub: b, revision: main}, dtype: float16, device: cpu}
workloads:
  two: {prompts: ["The with statement", "Return a list"]}
  lines: {file: lines.txt, count: 2, prompt_tokens: 4}
measure: {workload: two, runs: 2, warmup: 0, max_new_tokens: 8, seed: 0}
certificate: {prompts: 2, max_new_tokens: 8}
trees: {configs: [tree], prompts: 1}
configs:
  ar: {strategy: autoregressive, labels: {forward: Autoregressive}}
  linear: {strategy: linear, num_draft_tokens: 3}
  tree: {strategy: tree, depth: 4, branch_factor: 8, prune_threshold: 0.1, node_budget: 16}
  dynamic: {strategy: dynamic_tree, d_base: 2, tau_high: 0.9}
  best: {strategy: best_first, ngram: true}
sweeps: {tuned: {best_of: [linear, best]}}
tables: {forward: [ar, tuned, tree], backward: [tree, ar]}
sections: {ablation: [forward], families: [backward]}
experiments:
  grid: {configs: [tree], grid: {depth: [2, 3], branch_factor: [1, 2]}}
  lengths: {configs: [ar, tuned], grid: [{max_new_tokens: [4, 8]}, {runs: 1}]}
"""
"""Every section of a configuration, once."""


@contextmanager
def limited(what):
    """An error, not a hang, where a mutant takes `LIMIT_S` of the processor; errors name it."""

    def over(*_):
        raise TimeoutError(f"{what} took more than {LIMIT_S:g} s of the processor")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def configurations(seeds, folder):
    """Mutants of a configuration, every fourth one of its text; counts of valid and refused."""
    mutator = mutants.Mutator(yaml.safe_load(CONFIG))
    path = folder / "config.yaml"
    counts = Counter()
    for seed in seeds:
        with limited(f"configuration {seed}"):
            try:
                if seed % 4:
                    config = parse_config(mutator.structural(seed))
                else:
                    path.write_bytes(mutator.text(CONFIG.encode(), seed))
                    config = load_config(path)
                _use(config)
            except ConfigError as error:
                _clear(str(error))
                counts["refused"] += 1
            else:
                counts["valid"] += 1
    return counts


def _use(config):
    """What the pipeline asks of every valid configuration."""
    again = parse_config(json.loads(config.canonical()))
    assert again == config
    assert again.canonical() == config.canonical()
    for section in config.sections:
        config.section(section).canonical()
    points = [point for name in config.experiments for point in config.points(name)]
    for name in dict.fromkeys([*config.measured, *(point.run for point in points[:20])]):
        # Of a name comes a file below results/, and an argument of a shell.
        assert name.replace("-", "").replace("_", "").isalnum()
        assert name.isascii()
        assert len(name) <= 64
        strategy = config.run(name).strategy
        assert strategy.describe()
        assert max(strategy.widths, default=0) <= MAX_NODES
        if not config.files(name):
            config.spec(name).canonical()


def results(seeds, folder):
    """Mutants of a result, a certificate and an aggregation; counts of valid and refused.

    Of every second one the data is changed and sealed anew, so that the schema is all that stands
    in its way; then it need not be equal, but must be good for a table or refused.
    """
    study = synthetic.config(prompts=2, runs=1)
    synthetic.write(study, folder)
    certificate = folder / "certificate.json"
    write_certificate(certificate, synthetic.certificate(study))
    whole = (certificate, synthetic.CERTIFYING)
    aggregated = folder / "aggregation.json"
    write_ablation(aggregated, aggregate(study, folder, synthetic.SOURCE, whole))
    run = folder / "micro" / "tree.json"
    kinds = [
        (path, read, path.read_bytes(), mutants.Mutator(json.loads(path.read_bytes())))
        for path, read in (
            (run, read_result),
            (certificate, read_certificate),
            (aggregated, read_ablation),
        )
    ]
    originals = [read(path) for path, read, _, _ in kinds]
    path = folder / "mutant.json"
    counts = Counter()
    for seed in seeds:
        kind = seed % len(kinds)
        origin, read, text, mutator = kinds[kind]
        forged = seed % 2 == 0
        if forged or seed % 3:
            data = mutator.structural(seed)
            if forged:
                data.pop(SEAL, None)
            changed = mutants.as_json(data)
            changed = sealed(changed) if forged and data else changed
            path.write_text(changed, encoding="utf-8", errors="replace")
        else:
            path.write_bytes(mutator.text(text, seed))
        with limited(f"result {seed}"):
            try:
                found = read(path)
            except ResultError as error:
                _clear(str(error), f"{path}: not a valid ", f"remove it and run: snakemake {path}")
                counts["refused"] += 1
                continue
            counts["valid"] += 1
            if not forged:
                assert found == originals[kind], f"result {seed} says something else"
            elif origin == run and counts["aggregated"] < 40:
                counts["aggregated"] += 1
                write_result(run, found)
                try:
                    aggregate(study, folder, synthetic.SOURCE, whole)
                except ResultError as error:
                    _clear(str(error), str(folder))
                write_result(run, originals[kind])
    return counts


def _clear(message, *parts):
    """One error of a length that can be read, which holds `parts`."""
    assert len(message) < 20_000
    assert "Traceback" not in message
    for part in (*parts, " "):
        assert part in message, message
