"""Published Bayesian optimisers behind the benchmark's ask, tell and recommend.

All of them are told the parents and the middle first, and leave their own start-up out; everything
else stays as they ship it. The older parent is not told where α keeps it out of their box, except
to BoTorch, whose model takes points from anywhere. Those that only know boxes search soups of more
than two parents by stick-breaking, by which the unit cube is spread evenly over the simplex;
BoTorch searches the simplex itself, as a linear constraint.
"""

from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from landscapes import Landscape
from mlflow_soup.records import Score
from started import Started, Weights, rounded

Array = NDArray[np.float64]


class Box(Started):
    """Searches the unit cube of K − 1 dimensions."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        super().__init__(landscape, seed)
        self.begin = sum(weights[-1] >= self.alpha for weights in self.queue)

    @property
    def dimensions(self) -> int:
        """Of the cube."""
        return self.parents - 1

    def tell(self, weights: Weights, score: Score) -> None:
        """Tell the peer what its box holds."""
        super().tell(weights, score)
        if weights[-1] >= self.alpha:
            self.learn(self.cube(weights), score.value)

    def propose(self) -> Weights:
        """The peer's proposal, as weights."""
        return self.weights(self.suggest())

    def cube(self, weights: Sequence[float]) -> list[float]:
        """Point of the cube at feasible weights; the inverse of `weights`."""
        stick, point = 1.0, []
        for i, piece in enumerate(self._free(weights)[:-1]):
            share = min(piece / stick, 1.0) if stick > 1e-9 else 0.5
            point.append(1 - (1 - share) ** (self.parents - 1 - i))
            stick -= piece
        return point

    def weights(self, point: Sequence[float]) -> Weights:
        """Feasible weights at a point of the cube, uniform when the point is."""
        stick, pieces = 1.0, []
        for i, x in enumerate(point):
            pieces.append(
                stick * (1 - (1 - min(max(float(x), 0), 1)) ** (1 / (self.parents - 1 - i)))
            )
            stick -= pieces[-1]
        return rounded(
            (1 - self.alpha) * np.array([stick, *pieces[::-1]]) + self.alpha * self._newest
        )

    def learn(self, point: list[float], value: float) -> None:
        """Tell the peer."""
        raise NotImplementedError

    def suggest(self) -> Sequence[float]:
        """Ask the peer."""
        raise NotImplementedError

    @property
    def _newest(self) -> Array:
        return np.eye(self.parents)[-1]

    def _free(self, weights: Sequence[float]) -> Array:
        """What of each weight the search is free to choose, newest first, scaled to sum to 1."""
        free = (np.array(weights) - self.alpha * self._newest) / (1 - self.alpha)
        return np.clip(free, 0, 1)[::-1]


class Skopt(Box):
    """scikit-optimize, gp_hedge."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        from skopt import Optimizer

        super().__init__(landscape, seed)
        self.optimizer = Optimizer(
            [(0.0, 1.0)] * self.dimensions,
            "GP",
            acq_func="gp_hedge",
            n_initial_points=self.begin,
            random_state=seed,
        )

    def learn(self, point: list[float], value: float) -> None:
        """It minimises."""
        self.result = self.optimizer.tell(point, -value)

    def suggest(self) -> Sequence[float]:
        """What it decided when it was told."""
        return self.optimizer.ask()  # type: ignore[no-any-return]

    def recommend(self) -> Weights:
        """The minimum of its posterior mean, once it has one: after the start."""
        from skopt import expected_minimum

        if not self.result.models:
            return super().recommend()
        return self.weights(expected_minimum(self.result, random_state=self.seed)[0])


class Optuna(Box):
    """Optuna with one of its samplers."""

    def __init__(self, landscape: Landscape, seed: int, sampler: str) -> None:
        import optuna

        super().__init__(landscape, seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(
            direction="maximize",
            sampler=getattr(optuna.samplers, sampler)(seed=seed, n_startup_trials=self.begin),
        )
        self.names = [f"x{i}" for i in range(self.dimensions)]
        self.distributions = {
            name: optuna.distributions.FloatDistribution(0, 1) for name in self.names
        }
        self.trial: Any = None

    def learn(self, point: list[float], value: float) -> None:
        """Finish its trial, or hand it one that was not its own."""
        import optuna

        if self.trial is not None:
            self.study.tell(self.trial, value)
        else:
            params = dict(zip(self.names, point, strict=True))
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=self.distributions, value=value
                )
            )

    def suggest(self) -> Sequence[float]:
        """Its next trial."""
        self.trial = self.study.ask(self.distributions)
        return [self.trial.params[name] for name in self.names]


class BayesOpt(Box):
    """bayesian-optimization, with a GP-Hedge of its three acquisitions."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        from bayes_opt import BayesianOptimization, acquisition

        super().__init__(landscape, seed)
        self.names = [f"x{i}" for i in range(self.dimensions)]
        bases = [
            acquisition.ExpectedImprovement(xi=0.01),
            acquisition.ProbabilityOfImprovement(xi=0.01),
            acquisition.UpperConfidenceBound(),
        ]
        self.optimizer = BayesianOptimization(
            f=None,
            pbounds=dict.fromkeys(self.names, (0.0, 1.0)),
            acquisition_function=acquisition.GPHedge(bases),
            random_state=seed,
            verbose=0,
            allow_duplicate_points=True,
        )

    def learn(self, point: list[float], value: float) -> None:
        """It maximises, and prints a note for every point it knows already."""
        with redirect_stdout(StringIO()):
            self.optimizer.register(dict(zip(self.names, point, strict=True)), value)

    def suggest(self) -> Sequence[float]:
        """Its next point."""
        point = self.optimizer.suggest()
        return [point[name] for name in self.names]


class BoTorch(Started):
    """BoTorch's default GP with one of its acquisitions, over the simplex."""

    sums = True  # whether the coordinates of a point must sum to at most 1

    def __init__(self, landscape: Landscape, seed: int, acquisition: str) -> None:
        import torch

        super().__init__(landscape, seed)
        torch.manual_seed(seed)
        self.acquisition = acquisition

    @property
    def dimensions(self) -> int:
        """Of a point."""
        return self.parents - 1

    def points(self, weights: Sequence[Weights]) -> Array:
        """All weights but the oldest's, scaled by α, shape (n, K − 1)."""
        points = np.array(weights)[:, 1:] / (1 - self.alpha)
        points[:, -1] -= self.alpha / (1 - self.alpha)
        return np.asarray(points)

    def weights(self, point: Array) -> Weights:
        """Weights at a point; the inverse of `points`."""
        rest = (1 - self.alpha) * point
        rest[-1] += self.alpha
        return rounded(np.array([0.0, *rest]))

    def propose(self) -> Weights:
        """The maximum of the acquisition."""
        from botorch import acquisition as table

        model, points, values = self._fit()
        feasible = points[:, -1] >= 0
        if self.acquisition == "LogEI":
            utility = table.LogExpectedImprovement(model, best_f=values[feasible].max())
        else:
            utility = table.qLogNoisyExpectedImprovement(model, X_baseline=points[feasible])
        return self._maximise(utility)

    def recommend(self) -> Weights:
        """The maximum of the posterior mean."""
        from botorch.acquisition import PosteriorMean

        return self._maximise(PosteriorMean(self._fit()[0]))

    def _fit(self) -> tuple[Any, Any, Any]:
        """The model, the points and the scores."""
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.mlls import ExactMarginalLogLikelihood

        x = torch.tensor(self.points([weights for weights, _ in self.told]), dtype=torch.float64)
        y = torch.tensor([[value] for _, value in self.told], dtype=torch.float64)
        model = SingleTaskGP(x, y)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model, x, y

    def _maximise(self, utility: Any) -> Weights:
        import torch
        from botorch.optim import optimize_acqf

        free = self.dimensions
        below_one = (torch.arange(free), -torch.ones(free, dtype=torch.float64), -1.0)
        best, _ = optimize_acqf(
            utility,
            bounds=torch.tensor([[0.0] * free, [1.0] * free], dtype=torch.float64),
            q=1,
            num_restarts=5,
            raw_samples=128,
            inequality_constraints=[below_one] if self.sums and free > 1 else None,
        )
        return self.weights(best[0].numpy())


# name → the module that must be there, the class and what else it is made of
PEERS: dict[str, tuple[str, type[Started], tuple[str, ...]]] = {
    "scikit-optimize gp_hedge": ("skopt", Skopt, ()),
    "Optuna GPSampler": ("optuna", Optuna, ("GPSampler",)),
    "Optuna TPE": ("optuna", Optuna, ("TPESampler",)),
    "BoTorch LogEI": ("botorch", BoTorch, ("LogEI",)),
    "BoTorch qLogNEI": ("botorch", BoTorch, ("qLogNEI",)),
    "bayesian-optimization hedge": ("bayes_opt", BayesOpt, ()),
}


def installed(*over: type[Started]) -> dict[str, Callable[[Landscape, int], Started]]:
    """The peers that can be imported here, by name.

    Args:
        over: classes with coordinates of their own, which go before those of the peers.
    """

    def maker(kind: type[Started], rest: tuple[str, ...]) -> Callable[[Landscape, int], Started]:
        made = type(kind.__name__, (*over, kind), {})
        return lambda landscape, seed: made(landscape, seed, *rest)

    return {
        name: maker(kind, rest) for name, (module, kind, rest) in PEERS.items() if find_spec(module)
    }
