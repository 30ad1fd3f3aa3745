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
