"""Values with confidence intervals over prompts: 95 % percentile bootstrap.

Efron and Tibshirani (1993), chapter 13. Prompts are resampled and not generations: runs of one
prompt are repetitions of one case, and counting them as independent would make every interval too
narrow. The percentile interval is itself somewhat narrow for few prompts. The seed is fixed, so
equal results give equal bytes.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from dynatree.ablation import Estimate, Interval

Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From samples [..., prompts, values per prompt] to one value for each sample [...]."""

RESAMPLES = 10_000
CHUNK = 500
SEED = 0


def estimate(values: Floats, statistic: Statistic) -> Estimate:
    """The statistic of `values` [prompts, values per prompt], its interval over prompts."""
    prompts = len(values)
    value = float(statistic(values))
    if prompts == 1:
        return Estimate(value=value, interval=None)
    generator = np.random.default_rng(SEED)
    # In chunks, because all resamples of a large workload at once would not fit into memory.
    resampled = np.concatenate(
        [
            statistic(values[generator.integers(prompts, size=(CHUNK, prompts))])
            for _ in range(RESAMPLES // CHUNK)
        ]
    )
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value=value, interval=Interval(low=float(low), high=float(high)))


def median(samples: Floats) -> Floats:
    """The median over prompts and values."""
    return np.asarray(np.median(samples, axis=(-2, -1)))


def geometric_mean(samples: Floats) -> Floats:
    """The one mean of ratios that does not depend on which side is the reference.

    Fleming and Wallace (1986), CACM 29(3).
    """
    return np.asarray(np.exp(np.log(samples).mean(axis=(-2, -1))))


def paired_ratios(rates: Floats, reference: Floats) -> Floats:
    """From rates [prompts, runs] of two methods to one ratio for each prompt [prompts].

    Each is the median over runs of the ratio of two neighbours in time, so that drift cancels.
    """
    return np.asarray(np.median(rates / reference, axis=1))


def independent_ratio(values: Floats, reference: Floats) -> Estimate:
    """Ratio of the geometric means of values [prompts] and of `reference` [other prompts].

    The two are resampled independently: nothing pairs a prompt with another one.
    """
    value = float(np.exp(np.log(values).mean() - np.log(reference).mean()))
    if min(len(values), len(reference)) == 1:
        return Estimate(value=value, interval=None)
    generator = np.random.default_rng(SEED)
    means = [
        np.log(side)[generator.integers(len(side), size=(RESAMPLES, len(side)))].mean(axis=1)
        for side in (values, reference)
    ]
    low, high = np.percentile(np.exp(means[0] - means[1]), [2.5, 97.5])
    return Estimate(value=value, interval=Interval(low=float(low), high=float(high)))


def crossed_ratio(rates: Floats, reference: Floats) -> tuple[tuple[float, float], Estimate]:
    """Ratio of the rates [prompts, runs] of two jobs that timed the same prompts.

    A prompt's rate is the median over its job's runs, the ratio a geometric mean over prompts of
    ratios of two such medians. Prompts and the runs of each job are resampled independently (the
    pigeonhole bootstrap; Owen, 2007, Annals of Applied Statistics 1(2)), because what slows a
    machine down for a while slows a whole pass over the prompts. Its intervals are rather too wide.

    Returns:
        The medians over all of `rates` and of `reference`, and the ratio.
    """
    prompts = len(rates)
    logs = [np.log(np.median(side, axis=1)) for side in (rates, reference)]
    value = float(np.exp((logs[0] - logs[1]).mean()))
    medians = (float(np.median(rates)), float(np.median(reference)))
    if prompts == 1:
        return medians, Estimate(value=value, interval=None)
    generator = np.random.default_rng(SEED)
    samples = []
    for _ in range(RESAMPLES // CHUNK):
        chosen = generator.integers(prompts, size=(CHUNK, prompts, 1))
        levels = []
        for side in (rates, reference):
            runs = generator.integers(side.shape[1], size=(CHUNK, 1, side.shape[1]))
            levels.append(np.log(np.median(side[chosen, runs], axis=2)))
        samples.append(np.exp((levels[0] - levels[1]).mean(axis=1)))
    low, high = np.percentile(np.concatenate(samples), [2.5, 97.5])
    return medians, Estimate(value=value, interval=Interval(low=float(low), high=float(high)))
