"""Other published laws for learning rate and batch, as the paper tabulates them, beside its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from gnomon.errors import DataError, GnomonWarning, MethodError, nearest
from gnomon.planning.step_law.law import FITTED, positive, whole
from gnomon.planning.step_law.runs import excess_loss, read_runs

__all__ = [
    "LAWS",
    "Law",
    "chinchilla_allocation",
    "compare_laws",
    "compare_laws_on_runs",
    "law_on_runs",
    "predict_with",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What a law may look at: N and D; compute C in FLOPs; the loss; units of N and D for a law that states none."""

    n: Array
    d: Array
    compute: Array
    loss: Array | None = None
    units: tuple[float, float] | None = None
    printed: bool = False


@dataclass(frozen=True)
class Law:
    """One published law.

    Attributes
    ----------
    name, source : str
    lr, batch : callable or None
        Of a `Setting`; None where the source gives no rule.
    needs : tuple of str
        Of ``"loss"`` (for the batch) and ``"units"``.
    excess : float or None
        Relative excess loss on the paper's test set, per mille, as the paper prints it.
    note : str
        What to know of it.
    """

    name: str
    source: str
    lr: Callable[[Setting], Array] | None
    batch: Callable[[Setting], Array] | None
    needs: tuple[str, ...] = ()
    excess: float | None = None
    note: str = ""


def _step_law(which: int) -> Callable[[Setting], Array]:
    return lambda s: FITTED(s.n, s.d)[which]


def _openai_lr(s: Setting) -> Array:
    lr = 3.239e-3 - 1.395e-4 * np.log(s.n)
    return np.where(lr > 0, lr, np.nan)


def _by_loss(constant: float, exponent: float) -> Callable[[Setting], Array]:
    def batch(s: Setting) -> Array:
        assert s.loss is not None
        return (2e18 if s.printed else constant) * s.loss**-exponent

    return batch


def _microsoft(s: Setting) -> Array:
    assert s.units is not None
    return 1.3192e-5 * (s.n / s.units[0]) ** -0.23 * (s.d / s.units[1]) ** -0.32


_LOSS_NOTE = "constant of the source; the paper prints 2e18, which gives about 1e16 tokens"

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("step-law", "Li et al. 2025", _step_law(0), _step_law(1), excess=0.94),
        Law(
            "openai",
            "Kaplan et al. 2020",
            _openai_lr,
            _by_loss(2e8, 4.76190),
            needs=("loss",),
            excess=9.51,
            note=f"batch: {_LOSS_NOTE}; no learning rate above 1.2e10 parameters, where the formula is negative",
        ),
        Law(
            "microsoft",
            "Bjorck et al. 2024",
            _microsoft,
            None,
            needs=("units",),
            excess=9.25,
            note="the units of N and D behind its constant are not stated: give units=(one unit of N, one of D)",
        ),
        Law(
            "deepseek",
            "Bi et al. 2024",
            lambda s: 0.3188 * s.compute**-0.1250,
            lambda s: 0.2920 * s.compute**0.3271,
            excess=9.26,
        ),
        Law("porian", "Porian et al. 2024", lambda s: 3.7 * s.n**-0.36, lambda s: 0.7576 * s.n**0.703, excess=3.71),
        Law(
            "minicpm",
            "Hu et al. 2024",
            None,
            _by_loss(1.21e9, 6.24),
            needs=("loss",),
            note=f"learning rate 0.01 with muP only; batch: {_LOSS_NOTE}",
        ),
        Law("meituan", "MeiTuan 2024", None, None, note="lr = lambda * loss^-alpha, with neither constant given"),
    )
}


def predict_with(
    name: str,
    n_params: ArrayLike,
    n_tokens: ArrayLike,
    *,
    compute: ArrayLike | None = None,
    loss: ArrayLike | None = None,
    units: tuple[float, float] | None = None,
    printed: bool = False,
) -> tuple[Array | None, Array | None]:
    """Return learning rate and batch in tokens by one law; None for what it does not give.

    Parameters
    ----------
    name : str
        One of `LAWS`.
    n_params, n_tokens : array_like
        Non-embedding parameters and tokens.
    compute : array_like, optional
        FLOPs of the run, for DeepSeek's law: ``flops_per_token(...) * n_tokens``; default 6 N D.
    loss : array_like, optional
        The expected final loss (a `LossLaw` predicts it), for the batch of OpenAI's and MiniCPM's.
    units : (float, float), optional
        One unit of N and of D, for Microsoft's law.
    printed : bool, default False
        For OpenAI's and MiniCPM's batch take 2e18, as the paper prints, not 2e8 and 1.21e9 of the sources.

    Returns
    -------
    lr, batch : float64 array or None

    Raises
    ------
    MethodError
        When there is no such law, it gives nothing, or it needs `units` and there are none.

    Examples
    --------
    >>> lr, batch = predict_with("porian", 1e9, 1e11)
    >>> f"{lr:.2e}", f"{batch:.3g}"
    ('2.13e-03', '1.61e+06')
    """
    if name not in LAWS:
        raise MethodError(f"there is no law {name!r}. {nearest(name, LAWS, noun='law')}")
    law = LAWS[name]
    if law.lr is None and law.batch is None:
        raise MethodError(f"the law {name!r} cannot be used: {law.note}. Laws: {', '.join(LAWS)}.")
    if "units" in law.needs and units is None:
        raise MethodError(f"the law {name!r} cannot be used as it is: {law.note}.")
    n, d = np.broadcast_arrays(positive("n_params", n_params), positive("n_tokens", n_tokens))
    setting = Setting(
        n=n,
        d=d,
        compute=6 * n * d if compute is None else positive("compute", compute),
        loss=None if loss is None else positive("loss", loss),
        units=None if units is None else (float(positive("units", units[0])), float(positive("units", units[1]))),
        printed=printed,
    )
    batch = None if law.batch is None or ("loss" in law.needs and loss is None) else law.batch(setting)
    return (None if law.lr is None else law.lr(setting)), batch


def compare_laws(
    n_params: float,
    n_tokens: float,
    seq_len: int = 2048,
    *,
    laws: Sequence[str] | None = None,
    compute: float | None = None,
    loss: float | None = None,
    units: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Return what every published law would choose for one run.

    Parameters
    ----------
    n_params, n_tokens : float
        Non-embedding parameters and tokens.
    seq_len : int, default 2048
        Tokens in one sequence.
    laws : sequence of str, optional
        Some of `LAWS`; default all that give something.
    compute, loss, units
        As for `predict_with`. Without `loss` the laws by loss have no batch; without `units` Microsoft's is left out.

    Returns
    -------
    DataFrame
        Indexed by law: ``source``, ``lr``, ``batch_tokens``, ``batch_sequences``, ``steps`` (NaN where the law gives
        none), ``paper_excess`` (per mille, as the paper prints it) and ``note``.

    Raises
    ------
    MethodError
        As `predict_with`.

    Examples
    --------
    >>> compare_laws(1e9, 1e11).loc["deepseek", "batch_tokens"].round(-4).item()
    1830000.0
    """
    seq_len = whole("seq_len", seq_len)
    usable = [n for n, law in LAWS.items() if (law.lr or law.batch) and ("units" not in law.needs or units)]
    rows: dict[str, dict[str, Any]] = {}
    for name in usable if laws is None else laws:
        lr, batch = predict_with(name, n_params, n_tokens, compute=compute, loss=loss, units=units)
        law, tokens = LAWS[name], np.nan if batch is None else float(batch)
        missing = "no batch without an expected loss" if "loss" in law.needs and loss is None else ""
        rows[name] = {
            "source": law.source,
            "lr": np.nan if lr is None else float(lr),
            "batch_tokens": tokens,
            "batch_sequences": tokens / seq_len,
            "steps": np.nan if batch is None else float(math.ceil(n_tokens / tokens)),
            "paper_excess": np.nan if law.excess is None else law.excess,
            "note": missing or law.note,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("law")


def compare_laws_on_runs(
    runs: Any,
    laws: Sequence[str] | Mapping[str, Callable[[pd.DataFrame], tuple[ArrayLike, ArrayLike | None]]] | None = None,
    *,
    seq_len: int = 2048,
) -> pd.DataFrame:
    """Return how much loss each law's choice costs on a table of runs, by the run nearest to it in every group.

    Parameters
    ----------
    runs : str, Path or DataFrame
        A table of runs for `read_runs`, or what it returned.
    laws : sequence of str, or mapping of str to callable, optional
        Some of `LAWS`, or functions as `excess_loss` takes them. Default: the laws that need no units, and ``constant``
        (3e-4 and 0.5M tokens); of these, one that gives no learning rate for a group is left out with a warning.
        Laws without a batch, or whose batch needs a loss, get the best batch of the group. Compute is M * D where the
        table has the widths, else 6 N D.
    seq_len : int, default 2048

    Returns
    -------
    DataFrame
        Indexed by law, best first: ``mean``, ``max`` (per mille over the best run, over groups), ``groups``.

    Raises
    ------
    DataError
        When the table cannot be used, or a law you named gives no learning rate for a group.
    """
    table = runs if isinstance(runs, pd.DataFrame) and "excess" in runs else read_runs(runs, seq_len)
    default = laws is None
    if laws is None:
        laws = [*(n for n, law in LAWS.items() if law.lr and "units" not in law.needs), "constant"]
    chosen = dict(laws) if isinstance(laws, Mapping) else {name: law_on_runs(name) for name in laws}
    rows = {}
    for name, law in chosen.items():
        try:
            found = excess_loss(table, law)
        except DataError as error:
            if not default:
                raise
            warnings.warn(f"left out: {error}", GnomonWarning, stacklevel=2)
            continue
        rows[name] = {"mean": found["excess"].mean(), "max": found["excess"].max(), "groups": len(found)}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("mean").rename_axis("law")


def law_on_runs(name: str) -> Callable[[pd.DataFrame], tuple[ArrayLike, ArrayLike | None]]:
    """Return a law in the form `excess_loss` takes; ``"constant"`` is 3e-4 and 0.5M tokens whatever the run.

    Parameters
    ----------
    name : str
        One of `LAWS` that gives a learning rate and needs no units, or ``"constant"``.

    Returns
    -------
    callable
        Compute is M * D where the table has the widths, else 6 N D; a batch that needs a loss is left to the group.
    """
    if name == "constant":
        return lambda best: (np.full(len(best), 3e-4), np.full(len(best), 5e5))

    def choose(best: pd.DataFrame) -> tuple[ArrayLike, ArrayLike | None]:
        compute = (best["M"].fillna(6 * best["N"]) * best["D"]).to_numpy()
        lr, batch = predict_with(name, best["N"].to_numpy(), best["D"].to_numpy(), compute=compute)
        if lr is None or not np.isfinite(lr).all():
            where = "" if lr is None else f" for N = {best['N'][~np.isfinite(lr)].iloc[0]:g}"
            raise DataError(f"the law {name!r} gives no learning rate{where}. Leave it out of the comparison.")
        return lr, batch

    return choose


def chinchilla_allocation(
    *, compute: float | None = None, n_params: float | None = None, n_tokens: float | None = None, ratio: float = 20.0
) -> tuple[float, float]:
    """Split compute between parameters and tokens, about 20 tokens per parameter (Hoffmann et al. 2022).

    That work gives no learning rate and no batch; this is for choosing N and D before asking for these.

    Parameters
    ----------
    compute, n_params, n_tokens : float, optional
        Exactly one: FLOPs with C = 6 N D, parameters, or tokens.
    ratio : float, default 20
        Tokens per parameter.

    Returns
    -------
    (float, float)
        Parameters and tokens.

    Raises
    ------
    MethodError
        When not exactly one is given, or it is not positive.

    Examples
    --------
    >>> chinchilla_allocation(n_params=1e9)
    (1000000000.0, 20000000000.0)
    """
    given = [k for k, v in (("compute", compute), ("n_params", n_params), ("n_tokens", n_tokens)) if v is not None]
    if len(given) != 1:
        raise MethodError(f"give exactly one of compute, n_params, n_tokens; given: {', '.join(given) or 'none'}.")
    r = float(positive("ratio", ratio))
    if n_params is not None:
        n = float(positive("n_params", n_params))
    elif n_tokens is not None:
        n = float(positive("n_tokens", n_tokens)) / r
    else:
        assert compute is not None
        n = math.sqrt(float(positive("compute", compute)) / (6 * r))
    return n, n * r
