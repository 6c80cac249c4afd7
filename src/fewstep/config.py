"""The settings of each command, as the dataclass that its function takes. No heavy imports: `--help` reads this file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Prediction = Literal["x0", "eps", "v", "flow", "score"]
NetworkKind = Literal["auto", "mlp", "unet", "dit"]
Solver = Literal["euler", "ddim", "heun", "dpmpp_2m", "unipc", "ipndm", "deis", "ancestral", "dpmpp_2m_sde"]

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Source:
    """Which data."""

    data: str
    """digits, mnist, fashion-mnist, cifar10, a folder of images, or an .npy/.npz file."""
    data_folder: str | None = None
    """Where a named set's files lie; default the folder of its name in $FEWSTEP_DATA or ./data."""
    size: Count | None = None
    """Resize images to this side."""


@dataclass(frozen=True, config=STRICT)
class Machine:
    """What to run on."""

    device: str = "auto"
    """cpu, cuda, ..; auto takes a GPU where there is one."""
    threads: Count | None = None
    """Threads of torch on the CPU; small networks run fastest on one."""


@dataclass(frozen=True, config=STRICT)
class TrainConfig:
    """How a diffusion model is trained: v-prediction on the cosine path."""

    iterations: Count = 5000
    """Steps of the optimiser."""
    batch_size: Count = 256
    """Samples per step."""
    lr: Positive = 1e-3
    """Adam's rate at the start; it falls to 0 along a cosine."""
    ema: Decay = 0.999
    """Decay of the averaged weights, which are the ones that are used."""
    network: NetworkKind = "auto"
    """mlp, or unet or dit from diffusers; auto takes the MLP up to 256 numbers per sample."""
    width: Count | None = None
    """Hidden units of the MLP (256), channels of the U-Net at full resolution (32), or of the DiT (128)."""
    depth: Count | None = None
    """Layers of the MLP (3), resolutions of the U-Net (2), or blocks of the DiT (4)."""
    sigma_min: Positive = 0.02
    """Cleanest level a schedule may visit before exact data, as sigma/alpha."""
    sigma_max: Positive = 40.0
    """Noisiest level, as sigma/alpha."""
    labels: bool = False
    """Train on the data's labels: a class-conditional model, for `sample --label`."""
    label_dropout: Share = 0.1
    """Share of labels that are replaced by "no class", which is what guidance, and a call without a label, ask for."""
    schedule: Literal["fixed", "adaptive"] = "fixed"
    """Training levels: fixed (log-normal in sigma/alpha), or adaptive: a schedule that is learned meanwhile and kept."""
    level_mean: float = -0.5
    """Mean of log(sigma/alpha) over the fixed levels."""
    level_std: Positive = 1.4
    """Its standard deviation."""
    schedule_every: Count = 100
    """Iterations between two estimates of the adaptive schedule."""
    schedule_blend: Annotated[float, Field(gt=0, le=1)] = 0.1
    """How far the adaptive schedule moves towards each estimate (the paper's gamma: 0.05 to 0.1)."""
    seed: int = 0
    """Seed of the weights, the levels and the noise."""


@dataclass(frozen=True, config=STRICT)
class LearnConfig:
    """How a schedule is learned: for a solver by its endpoint's error, or by the published costs."""

    solver: Solver = "dpmpp_2m"
    """The solver that the schedule is for."""
    steps: tuple[Count, ...] = ()
    """Numbers of steps that get refined levels of their own, which pays below about ten; may be repeated."""
    cost: Literal["endpoint", "corrector", "predictor"] | None = None
    """endpoint: the error of the solver, if need be without the noise that it draws; no data needed; default. corrector:
    Williams et al. 2024, blind to the solver. predictor: the same paper's, for euler and heun; differentiates the network."""
    noises: Annotated[int, Field(ge=64)] = 128
    """Noises whose endpoints are compared."""
    budget: Count = 15_000
    """Evaluations of the network for the curve, and again for each of the refined numbers of steps."""
    verdict_noises: Annotated[int, Field(ge=32, multiple_of=8)] = 256
    """Fresh noises for the verdict; for a solver without noise of its own they lie on arcs, 8 on each."""
    verdict_doublings: Annotated[int, Field(ge=0)] = 2
    """How often that number is doubled where they do not decide. A noise costs some 150 evaluations and at first some 15 runs
    per number of steps, later as many as there are schedules that may still be the best; a stochastic solver takes five times
    as many runs."""
    probes: Annotated[int, Field(ge=3)] = 100
    """Published costs: levels at which the cost is probed."""
    draws: Annotated[int, Field(ge=4)] = 64
    """Published costs: independent draws of data and noise per step between probes; 2 (probes - 1) draws evaluations."""
    tolerance: Positive | None = None
    """Corrector cost: double the draws until two halves of them agree on the levels to this share."""
    sigma_min: Positive | None = None
    """Cleanest level, as sigma/alpha; the model's own if not given."""
    sigma_max: Positive | None = None
    """Noisiest level, as sigma/alpha; the model's own if not given."""
    start: Positive | None = None
    """Image to image: the level, as sigma/alpha, that pictures are noised to; the schedule goes from there to data."""
    batch_size: Count = 512
    """Samples per call of the network."""
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True, config=STRICT)
class PreferenceConfig:
    """How a reward is learned from choices (Bradley-Terry)."""

    iterations: Annotated[int, Field(ge=5)] = 500
    """Most steps of the optimiser, for each of five networks."""
    patience: Count = 50
    """Steps without a better log-loss on the stopping pairs after which a network is done."""
    batch_size: Count = 256
    """Pairs per step."""
    lr: Positive = 1e-3
    """Adam's rate."""
    width: Annotated[int, Field(ge=8)] = 64
    """Hidden units up to 256 numbers per sample; for larger images four times the channels after the first halving."""
    seed: int = 0
    """Seed of the pairs that are asked for, the weights, the folds and the batches."""


@dataclass(frozen=True, config=STRICT)
class Condition:
    """What a conditional model is told."""

    cond: str | None = None
    """A .safetensors file of the network's further arguments, one row per condition; they are dealt out in turn."""
    guidance: Positive | None = None
    """Scale of classifier-free guidance; the file then holds each argument's "unconditional.<name>" as well."""


@dataclass(frozen=True, config=STRICT)
class FinetuneConfig:
    """How a few-step sampler and its energy are learned together (DxMI). Costs are means per dimension, in nats."""

    iterations: Count = 3500
    """Iterations: `critic_steps` of the value and energy and one step of the sampler, on one transition of each rollout."""
    density_iterations: Annotated[int, Field(ge=0)] = 1500
    """Iterations before these, in which the density of the data is learned, which the energy then starts from and is held
    to; 0 is the published method, whose energy starts from nothing and is held to 0."""
    density: Literal["auto", "scalar", "reconstruction"] = "auto"
    """Network of the density, where one is learned. scalar: any number of x, which weighs modes better in two dimensions;
    reconstruction: an autoencoder's error, which knows better what is strange in many (docs/results.md). auto: the first up to
    16 numbers per sample, the second beyond."""
    batch_size: Count = 128
    """Rollouts, and data, per iteration."""
    lr: Positive = 1e-4
    """Adam's rate for the sampler's network, at most. These rates fall linearly over the second half."""
    trust: Positive = 0.05
    """How far an iteration may move the means of the sampler's steps, as a divergence of the policy after it from the one
    before, in nats; lr is lowered where it moves them farther (a trust region, as TRPO has). It falls with the rates."""
    lr_std: NotNegative = 3e-4
    """Adam's rate for the log of the step noises; 0 leaves them where they start: on digits no worse (docs/results.md)."""
    lr_value: Positive = 1e-4
    """Adam's rate for the correction of value and energy; above this it learns small data by heart (docs/log.md)."""
    critic_steps: Count = 1
    """Steps of value and energy per iteration, with fresh data each. More of them steady the classes of some short
    runs; small data are learned by heart (docs/log.md)."""
    lr_density: Positive = 2e-3
    """Adam's rate for the density; it falls to 0 along a cosine."""
    tau: NotNegative | None = None
    """Temperature: weight of the entropy and velocity costs, per dimension. Derived from the density's spread if not given;
    without a density the paper's 0.1."""
    score: Literal["model", "density"] = "model"
    """Whose score the sampler follows, where there is a density: the pretrained model's, which costs an evaluation more per
    transition, in float32, or the density's own, for a model that has learned too little (docs/log.md)."""
    gamma: Positive = 1.0
    """Weight of the square of the energy's correction, which bounds it."""
    value: Literal["per_step", "shared"] = "per_step"
    """per_step: a value that knows the step; shared: one energy for all steps, as the paper has for images."""
    time_cost: Literal["none", "linear", "sigmoid"] = "sigmoid"
    """What a shared value is told that a step costs."""
    velocity_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    """Decay of the running mean square velocity (the paper's a, 0.99); 1 keeps the path's own, which is the default but where
    rollouts start at a level that shows the data twice as wide as the noise, farther from them than the path's noising leads:
    there it is 0.99."""
    momentum: Decay = 0.0
    """Adam's first moment decay, of sampler and value; above 0 the two players overshoot each other."""
    ema: Decay = 0.999
    """Decay of the averaged sampler and value, which are the ones that are used, in an iteration."""
    clip: Positive = 1.0
    """Largest norm of the gradient of the sampler's network."""
    last_std: NotNegative = 0.1
    """Fixed noise of the last step, added to the data as well; 0 makes the step deterministic, without running cost."""
    bf16: bool = False
    """Run the sampler's network in bfloat16; value and energy stay in float32."""
    compile: bool = False
    """Compile the sampler's network with torch.compile."""
    seed: int = 0
    """Seed of the value's weights, the data's order and the noise."""
