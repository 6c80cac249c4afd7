"""What does a step between neighbouring levels cost?

A sampler's step from level t to the cleaner t' moves x by a deterministic predictor F; a Langevin corrector would then
have to repair its law F#p_t (Williams et al. 2024, Sec. 3, with speed v = sigma). The work that is left to it:

    L(t, t') = sigma(t')^2  E_{x ~ p_t} || score(F(x), t') - grad log F#p_t (F(x)) ||^2

corrector cost   F(x) = x:   sigma(t')^2 E || score(x, t') - score(x, t) ||^2: both scores at the same x, which is drawn
                 at the *noisier* level by noising data; the weight is the *cleaner* level's. No derivatives. L = O(dt^2).
predictor cost   F a solver's step, J = dF/dx:   grad log F#p_t (F(x)) = J^{-T} [score(x, t) - grad log|det J(x)|],
                 so the difference is J^{-T} u with u = J^T score(F(x), t') - score(x, t) + grad log|det J(x)|.
                 L = O(dt^{2(p+1)}) for a solver of order p and exact scores: its length element is L^{1/(2(p+1))}.

J and its determinant are taken from F itself: densely in low dimension, else by J^T v alone, with iterative solves and
random probes z of the trace:   grad log|det J| = E_z grad_x [w^T J(x) z],   w = J^{-T} z held fixed.
Computed on the VE path, because the cost changes under x -> x/alpha (but not under a change of clock).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.denoiser import Denoiser, to_score
from fewstep.path import broadcast
from fewstep.solvers import SOLVERS

CORRECTOR_ORDER = 2  # L = O(dt^2), so the length element is L^{1/2}
PREDICTOR_ORDERS = {"euler": 4, "ddim": 4, "heun": 6}  # 2(p+1): the one-step deterministic solvers


def corrector_costs(
    denoiser: Denoiser,
    x0: Tensor,
    times: Tensor,
    draws: int,
    batch_size: int,
    cond: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
    moments: Moments | None = None,
) -> Tensor:
    """The cost of every step of `times` (k,), drawing by drawing: (k-1, draws), float64, summed over dimensions.

    denoiser: on a VE path. x0: data (n, *d); each step gets `draws` independent pairs of a datum and a noise. cond: one
    row per datum. 2 (k-1) draws samples go through the denoiser. `progress` wraps the batches. moments: `data_moments(x0)`,
    to take out of each step's draws what their Gaussian controls explain; 16 draws or more, whose values may be negative.
    """
    if moments is not None and draws < 16:
        raise ValueError(f"controls are fitted to each step's draws: at least 16, got {draws}; or leave moments out")
    steps = len(times) - 1
    step = torch.arange(steps).repeat_interleave(draws)
    where = generator.device if generator is not None else "cpu"
    which = torch.randint(len(x0), (len(step),), generator=generator, device=where)
    costs, known = torch.empty(len(step), dtype=torch.float64), torch.empty(len(step), 2, dtype=torch.float64)
    path = denoiser.path
    for at in progress(torch.arange(len(step)).split(batch_size)):
        noisier, cleaner, rows = times[step[at]], times[step[at] + 1], which[at.to(which.device)].to(x0.device)
        datum = x0[rows]
        noise = torch.randn(datum.shape, generator=generator, dtype=x0.dtype, device=where).to(x0.device)
        x = path.noised(datum, noise, noisier)
        given = {k: v[rows.to(v.device)] for k, v in cond.items()} if cond else None
        with torch.no_grad():
            before = to_score(denoiser(x, noisier, given), x, path, noisier)
            change = to_score(denoiser(x, cleaner, given), x, path, cleaner) - before
        weighted = (broadcast(path.sigma(cleaner), x) * change).flatten(1).double()
        costs[at] = (weighted**2).sum(1).cpu()
        if moments is not None:
            known[at] = controls(x, noise, path.sigma(noisier), path.sigma(cleaner), moments).cpu()
        _require_finite(costs[at], denoiser, times, step[at])
    each = costs.reshape(steps, draws)
    return each if moments is None else regressed(each, known.reshape(steps, draws, 2))


def _require_finite(costs: Tensor, denoiser: Denoiser, times: Tensor, step: Tensor) -> None:
    bad = step[~torch.isfinite(costs)]
    if len(bad):
        high, low = (float(denoiser.path.ratio(t)) for t in times[bad[0] : bad[0] + 2])
        raise ValueError(f"the model's score is not finite between sigma/alpha {high:.4g} and {low:.4g}")


def draws_until(
    block: Callable[[int], Tensor], error: Callable[[Tensor], float], tolerance: float, first: int = 64, most: int = 65536
) -> Tensor:
    """Draws (k-1, n) from block(n), their number doubled from `first` until error(draws) <= tolerance, `most` at the most.

    Doubling keeps the looks few: an error that is itself noisy would else stop at its first lucky value.
    """
    each = block(first)
    while error(each) > tolerance and each.shape[1] < most:
        each = torch.cat([each, block(min(each.shape[1], most - each.shape[1]))], 1)
    return each


# --- controls -----------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """mean (D,); variances (D,) along the columns of basis (D, D), or per dimension where basis is None; float64."""

    mean: Tensor
    variances: Tensor
    basis: Tensor | None


def data_moments(x0: Tensor, full_up_to: int = 2048) -> Moments:
    """The Gaussian with the data's mean and covariance; beyond `full_up_to` numbers per sample only the variances."""
    flat = x0.flatten(1).double()
    mean = flat.mean(0)
    if flat.shape[1] > full_up_to:
        return Moments(mean, flat.var(0, correction=0), None)
    centred = flat - mean
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(flat))
    return Moments(mean, variances.clamp(min=0), basis)


def controls(x: Tensor, noise: Tensor, noisier: Tensor, cleaner: Tensor, moments: Moments) -> Tensor:
    """Two numbers per draw (b, 2) whose expectation is 0: the Gaussian's own cost at x, and |noise|^2 less their means.

    x = datum + noisier * noise; noisier, cleaner: sigma, (b,). The mean is exact for any data with these moments.
    """
    z = x.flatten(1).double() - moments.mean
    z = z if moments.basis is None else z @ moments.basis
    high, low = (moments.variances + s.to(z)[:, None] ** 2 for s in (noisier, cleaner))
    gaussian = ((1 / low - 1 / high) ** 2 * (z**2 - high)).sum(1)  # without sigma^2, which the regression's slope absorbs
    return torch.stack([gaussian, (noise.flatten(1).double() ** 2).sum(1) - z.shape[1]], 1)


def regressed(each: Tensor, known: Tensor) -> Tensor:
    """Draws (k-1, n) less their least-squares share of the controls (k-1, n, c), step by step: the same mean, less noise."""
    known = known / known.std(1, keepdim=True).clamp(min=1e-300)
    centred, residual = known - known.mean(1, keepdim=True), each - each.mean(1, keepdim=True)
    ridge = 1e-9 * each.shape[1] * torch.eye(known.shape[2], dtype=each.dtype)  # for controls that are one and the same
    slope = torch.linalg.solve(centred.mT @ centred + ridge, centred.mT @ residual[..., None])
    return each - (known @ slope)[..., 0]


# --- predictor cost -----------------------------------------------------------------------------------------------


class PredictorCosts(NamedTuple):
    """each: (k-1, draws), float64, summed over dimensions; evaluations: passes through the network, backward ones too."""

    each: Tensor
    evaluations: int


def predictor_costs(
    denoiser: Denoiser,
    x0: Tensor,
    times: Tensor,
    draws: int,
    batch_size: int,
    solver: str = "euler",
    probes: int | None = None,
    cond: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[Sequence], Iterable] = iter,
) -> PredictorCosts:
    """The predictor cost of every step of `times` (k,) of a one-step solver; arguments as for `corrector_costs`.

    probes: of the trace, an even number per draw; None takes the dense Jacobian, d backward passes per draw. The square
    of the difference is freed of the probes' noise, so it is unbiased, exact at probes = d, and may be negative on a
    single draw. The noise in the difference falls as dt, the difference itself as dt^2: finer levels need more probes.
    """
    if solver not in PREDICTOR_ORDERS:
        raise ValueError(f"solver must be a one-step deterministic one, {', '.join(PREDICTOR_ORDERS)}; got {solver!r}")
    size = x0[0].numel()
    if probes is not None and (probes < 2 or probes % 2 or probes > size):
        raise ValueError(f"probes must be even, from 2 to the dimension {size}, or None for the dense Jacobian; got {probes}")
    path, where = denoiser.path, generator.device if generator is not None else "cpu"
    costs, evaluations = torch.empty(len(times) - 1, draws, dtype=torch.float64), 0
    batches = [(i, at) for i in range(len(times) - 1) for at in torch.arange(draws).split(batch_size)]
    for i, at in progress(batches):
        rows = torch.randint(len(x0), (len(at),), generator=generator, device=where).to(x0.device)
        noise = torch.randn(len(at), *x0.shape[1:], generator=generator, dtype=x0.dtype, device=where).to(x0.device)
        given = {k: v[rows.to(v.device)] for k, v in cond.items()} if cond else None
        step = _Step(denoiser, path.noised(x0[rows], noise, times[i]), times[i : i + 2], solver, given)
        if probes is None:
            square = (step.dense_difference().double() ** 2).sum(1)
        else:
            orthogonal = torch.randn(len(at), size, probes, generator=generator, dtype=x0.dtype, device=where)
            one, other = step.probed_differences(torch.linalg.qr(orthogonal.to(x0.device))[0])
            # the probes are drawn without replacement from d: the finite population's correction of the mean's variance
            noise_in_mean = (1 - probes / size) * ((one - other) / 2) ** 2
            square = (((one + other) / 2) ** 2 - noise_in_mean).sum(1)
        costs[i, at] = (path.sigma(times[i + 1]).to(square) ** 2 * square).cpu()
        evaluations += step.passes * len(at) * denoiser.evaluations
        _require_finite(costs[i, at], denoiser, times, torch.full_like(at, i))
    return PredictorCosts(costs, evaluations)


class _Step:
    """One solver step y = F(x) of a batch with its graph: the differences between the scores of p_t' and of F#p_t, at y."""

    def __init__(self, denoiser: Denoiser, x: Tensor, times: Tensor, solver: str, cond: Mapping[str, Tensor] | None):
        path, self.passes = denoiser.path, 0
        beliefs = []

        def predict(x: Tensor, t: Tensor) -> Tensor:
            beliefs.append(denoiser(x, t, cond))
            self.passes += 1
            return beliefs[-1]

        self.x = x.detach().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            self.y = next(SOLVERS[solver](predict, self.x, path, times, torch.randn_like))
        with torch.no_grad():
            y = self.y.detach()
            self.before = to_score(beliefs[0], x, path, times[0]).flatten(1).detach()
            self.after = to_score(predict(y, times[1]), y, path, times[1]).flatten(1)

    def back(self, v: Tensor, keep: bool = False) -> Tensor:
        """J^T v: (b, d); keep: with the graph for another derivative."""
        self.passes += 1
        return self._grad(self.y, v.reshape(self.y.shape), keep)

    def _grad(self, of: Tensor, v: Tensor, keep: bool = False) -> Tensor:
        if not of.requires_grad:  # constant: the Jacobian of a linear step
            return torch.zeros_like(self.x).flatten(1)
        (g,) = torch.autograd.grad(
            of, self.x, v, retain_graph=True, create_graph=keep, materialize_grads=True, allow_unused=True
        )
        return g.flatten(1)

    def dense_difference(self) -> Tensor:
        unit = torch.eye(self.before.shape[1]).to(self.before)
        jacobian = torch.stack([self.back(e.expand_as(self.before), keep=True) for e in unit], 1)
        log_det = torch.linalg.slogdet(jacobian)[1]
        target = self.before - self._grad(log_det, torch.ones_like(log_det))
        self.passes += 1
        return self.after - torch.linalg.solve_ex(jacobian.detach().mT, target)[0]  # inf, not an exception, where singular

    def probed_differences(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Two differences with grad log|det J| from each half of the orthonormal probes (b, d, m); float64."""
        size, m = probes.shape[1:]
        gradients = []
        for z in probes.unbind(-1):
            w = self.solve(z)
            pulled = self.back(w, keep=True)
            gradients.append(size * self._grad((pulled * z).sum(), torch.ones([]).to(z)))
            self.passes += 1
        base = self.back(self.after) - self.before
        halves = (gradients[: m // 2], gradients[m // 2 :])
        # u is as small as the difference, so the solve's relative error is the difference's
        one, other = (self.solve(base + torch.stack(half).mean(0)).double() for half in halves)
        return one, other

    def solve(self, right: Tensor, tolerance: float = 1e-5, most: int = 64) -> Tensor:
        """J^{-T} right by generalised conjugate residuals (GMRES's iterates), every row on its own: (b, d).

        Raises ValueError where a row's relative residual stays above 0.01.
        """
        tiny = torch.finfo(right.dtype).tiny
        solution, residual, scale = 0 * right, right, right.norm(dim=1, keepdim=True).clamp(min=tiny)  # 0 * nan stays nan
        directions: list[tuple[Tensor, Tensor]] = []
        while len(directions) < most:
            unsolved = residual.norm(dim=1, keepdim=True) > tolerance * scale
            if not bool(unsolved.any()):
                break
            p, ap = residual, self.back(residual)
            for q, aq in directions:
                share = (ap * aq).sum(1, keepdim=True)
                p, ap = p - share * q, ap - share * aq
            norm = ap.norm(dim=1, keepdim=True).clamp(min=tiny)
            p, ap = p / norm, ap / norm
            directions.append((p, ap))
            along = torch.where(unsolved, (residual * ap).sum(1, keepdim=True), 0.0)
            solution, residual = solution + along * p, residual - along * ap
        worst = float((residual.norm(dim=1, keepdim=True) / scale).max())
        if worst > 0.01:
            raise ValueError(f"a step's Jacobian could not be inverted (relative residual {worst:.2g}): take finer levels")
        return solution
