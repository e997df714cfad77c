"""The keys of a study file, `[search]` and the config of one trial: frozen dataclasses with their checks and defaults.
Standard library only.

The same classes read a study file (where a leaf may be a range, see `search/space.py`), a trial's `config.toml` and the
payload of a job, so a key has one meaning everywhere. Defaults are here and nowhere else.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from searchfm.errors import ConfigError, near
from searchfm.stopping import HANG_SECONDS
from searchfm.tables import Table, branch, digest, free, key, show, table

Shape = tuple[int, int, int]  # channels, height, width
Pool = Literal["none", "max", "average", "max-same"]

# Image shape and number of classes of the built-in data sets. Reading a folder of images gives its own.
DATASETS: dict[str, tuple[Shape, int]] = {
    "fashion-mnist": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}


class DataConfig(Table):
    """`[data]`: the data set and its split. The same for every trial of a study."""

    name: str = key("fashion-mnist", "name of a data set, or path of user images: a folder or an .npz file", fixed=True)
    subset: float = key(1.0, "fraction of the training part to use, after the validation split", gt=0, le=1, fixed=True)
    validation: float = key(
        0.15,
        "fraction of the training part held out to compare trials, unless the data have a validation part",
        gt=0,
        lt=1,
        fixed=True,
    )
    seed: int = key(0, "seed of the subset and of the validation split", ge=0, fixed=True)
    size: int = key(0, "side in pixels to resize images to, once; 0 keeps the original size", ge=0, le=1024, fixed=True)


class Model(Table):
    """An architecture."""

    fits: ClassVar[str] = ""  # the key that `fit_images` and `doubt` are about: other values of it may fit

    def fit_images(self, shape: Shape) -> None:
        """Checks the keys against the images' (channels, height, width). Raises ConfigError."""

    def doubt(self) -> str:
        """Why the keys make little sense together, though they train; "" if they do not."""
        return ""


class Mlp(Model, tag="mlp"):
    """Fully connected layers, each followed by batch norm (optional), ReLU and dropout."""

    layers: int = key(2, "hidden layers", ge=0, le=64)
    width: tuple[int, ...] = key(200, "units of each hidden layer", ge=1, per="layers")
    dropout: float = key(0.0, "probability of dropping a unit after each hidden layer", ge=0, lt=1)
    batch_norm: bool = key(False, "batch norm before each ReLU")


class Cnn(Model, tag="cnn"):
    """Stages of convolutions, each followed by pooling; then dense layers."""

    agree, fits = (("stages", "pool"), ("kernel",)), "stages"
    stages: int = key(2, "stages; a stage is `convs` convolutions and one pooling", ge=1, le=32)
    filters: tuple[int, ...] = key(32, "filters of each stage's convolutions", ge=1, per="stages")
    convs: int = key(1, "convolutions per stage", ge=1, le=8)
    kernel: int = key(3, "side of the convolution kernel in pixels, odd", ge=1, le=15)
    pool: tuple[Pool, ...] = key(
        "max", "pooling after each stage: 2x2, which halves the image; max-same: 3x3, same size", per="stages"
    )
    batch_norm: bool = key(False, "batch norm before each ReLU")
    conv_dropout: float = key(0.0, "probability of dropping a filter after each stage", ge=0, lt=1)
    head: Literal["flatten", "average"] = key("flatten", "how feature maps of the last stage become features")
    dense_layers: int = key(0, "hidden dense layers between the convolutions and the classes", ge=0, le=16)
    dense_width: tuple[int, ...] = key(100, "units of each hidden dense layer", ge=1, per="dense_layers")
    dropout: float = key(
        0.0,
        "probability of dropping a unit before the classes, and before hidden dense layers but the first",
        ge=0,
        lt=1,
    )

    def check(self) -> None:
        """The kernel must be odd, so that images keep their size."""
        if self.kernel % 2 == 0:
            raise ConfigError("kernel", f"= {self.kernel}: must be odd")

    def fit_images(self, shape: Shape) -> None:
        """The image must allow every halving."""
        halvings = sum(pool in ("max", "average") for pool in self.pool)
        if min(shape[1:]) >> halvings < 1:
            problem = f"halves images of {shape[1]}x{shape[2]} pixels {halvings} times, to nothing"
            raise ConfigError("pool", f'{problem}; use fewer stages, or "none" or "max-same" for some')


class Vit(Model, tag="vit"):
    """A vision transformer from scratch (Dosovitskiy et al. 2021, arXiv 2010.11929); stem: arXiv 2106.14881."""

    agree, fits = (("patch_size",), ("hidden_dim", "heads")), "patch_size"
    patch_size: int = key(4, "side of a patch in pixels; must divide the image side", ge=1)
    stem_convs: int = key(
        0, "3x3 convolutions per halving of the image; the last one halves it; 0: patches are projected", ge=0, le=8
    )
    hidden_dim: int = key(64, "width of a token", ge=1)
    layers: int = key(6, "encoder layers", ge=1, le=64)
    heads: int = key(4, "attention heads; must divide hidden_dim", ge=1)
    mlp_ratio: float = key(4.0, "MLP width of an encoder layer, as a multiple of hidden_dim", gt=0, le=16)
    dropout: float = key(0.0, "probability of dropping after embedding, projection and MLP", ge=0, lt=1)
    pooling: Literal["token", "average", "flatten"] = key(
        "token", "input of the classifier: class token, mean of tokens, or all tokens side by side"
    )

    def check(self) -> None:
        """Heads must divide hidden_dim."""
        if self.hidden_dim % self.heads:
            dim = self.hidden_dim
            raise ConfigError("heads", f"= {self.heads} must divide hidden_dim = {dim} {_divisors(dim)}")

    def fit_images(self, shape: Shape) -> None:
        """Patches must cover the image; timm would silently drop the remaining pixels."""
        for side in shape[1:]:
            if side % self.patch_size:
                problem = f"= {self.patch_size} must divide the images' side of {side} pixels {_divisors(side)}"
                raise ConfigError("patch_size", problem)


class Transfer(Model, tag="transfer"):
    """Any timm model by name. Training updates its head and its last `tuned_blocks` stages; the others are frozen."""

    fits = "tuned_blocks"

    model: str = key("resnet18", "name of a timm model")
    tuned_blocks: int | Literal["all"] = key(0, 'stages to train, from the top; 0: only the head; "all": all', ge=0)
    weights: str = key("hub", '"hub", "none", or the path of a .safetensors or .pth file')
    dropout: float = key(0.0, "probability of dropping a feature before the head", ge=0, lt=1)
    layer_decay: float = key(1.0, "learning rate of a stage, as a fraction of that of the stage above it", gt=0, le=1)

    def doubt(self) -> str:
        """Frozen stages need pretrained weights."""
        if self.weights != "none" or self.tuned_blocks == "all":
            return ""
        return (
            f'= {self.tuned_blocks} with model.transfer.weights = "none" keeps random weights frozen; "all" trains them'
        )


class Residual(Model, tag="residual"):
    """A residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2); its stem is 3x3."""

    agree, fits = (("stages",),), "stages"
    stages: int = key(3, "stages of residual blocks; each but the first halves the image", ge=1, le=6)
    blocks: int = key(2, "residual blocks per stage", ge=1, le=64)
    block: tuple[Literal["basic", "bottleneck"], ...] = key(
        "basic", "block type of each stage; bottlenecks give four times its filters", per="stages"
    )
    width: int = key(16, "filters of the first stage; each later stage doubles them", ge=1)
    dropout: float = key(0.0, "probability of dropping a feature before the classifier", ge=0, lt=1)

    def fit_images(self, shape: Shape) -> None:
        """The image must allow every halving."""
        if min(shape[1:]) >> (self.stages - 1) < 1:
            raise ConfigError("stages", f"= {self.stages}: halves images of {shape[1]}x{shape[2]} pixels to nothing")


class Custom(Model, tag="custom"):
    """A model of your own code, `factory(shape, classes, **params) -> nn.Module`. Runs only with --allow-code."""

    factory: str = key("", '"package.module:function", in the folder of the command or on PYTHONPATH', fixed=True)
    params: Mapping[str, Any] = free("arguments of the factory: values, lists of them, and ranges")

    def check(self) -> None:
        """The factory must be named as an entry point is."""
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", self.factory):
            raise ConfigError("factory", f'= {show(self.factory)}: must be "package.module:function"')


class ModelConfig(Table):
    """`[model]`: the architecture."""

    kind: Mlp | Cnn | Vit | Transfer | Residual | Custom = branch(
        Mlp, "the architecture", hint='a timm model is model.name = "transfer" with model.transfer.model = {}'
    )


class Sgd(Table, tag="sgd"):
    """Stochastic gradient descent."""

    agree = (("momentum", "nesterov"),)
    momentum: float = key(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov momentum")

    def check(self) -> None:
        """torch refuses Nesterov momentum without momentum."""
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov", "= true needs momentum > 0")


class Adagrad(Table, tag="adagrad"):
    """Adagrad (Duchi et al. 2011)."""

    lr_decay: float = key(0.0, "decay of the learning rate per step", ge=0)


class Rmsprop(Table, tag="rmsprop"):
    """RMSprop (Hinton 2012)."""

    alpha: float = key(0.99, "smoothing of the squared gradients", ge=0, lt=1)
    momentum: float = key(0.0, "momentum", ge=0, lt=1)


class Adam(Table, tag="adam"):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); weight_decay is L2 in the gradient."""

    beta1: float = key(0.9, "smoothing of the gradient", ge=0, lt=1)
    beta2: float = key(0.999, "smoothing of the squared gradient", ge=0, lt=1)


class AdamW(Table, tag="adamw"):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    beta1: float = key(0.9, "smoothing of the gradient", ge=0, lt=1)
    beta2: float = key(0.999, "smoothing of the squared gradient", ge=0, lt=1)


class OptimizerConfig(Table):
    """`[optimizer]`: the optimizer, its learning rate and weight decay."""

    kind: Sgd | Adagrad | Rmsprop | Adam | AdamW = branch(AdamW, "the optimizer")
    lr: float = key(1e-3, "maximum learning rate", gt=0)
    weight_decay: float = key(0.0, "decoupled for adamw, else L2; not for biases, norms, position embeddings", ge=0)
    clip: float = key(0.0, "maximum gradient norm; 0 is off", ge=0)


class Constant(Table, tag="constant"):
    """A constant learning rate."""


class StepDecay(Table, tag="step"):
    """Multiplies the learning rate by `factor` every `every` epochs."""

    every: int = key(5, "epochs between two multiplications", ge=1)
    factor: float = key(0.5, "factor of the learning rate", gt=0, le=1)


class Exponential(Table, tag="exponential"):
    """Multiplies the learning rate by `factor` per epoch, batch by batch."""

    factor: float = key(0.9, "factor of the learning rate per epoch", gt=0, le=1)


class Cosine(Table, tag="cosine"):
    """Half a cosine from the learning rate down to `floor` of it (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    floor: float = key(0.0, "final learning rate, as a fraction of the maximum", ge=0, le=1)


class OneCycle(Table, tag="one-cycle"):
    """One cycle of rise and fall (Smith & Topin 2018, arXiv 1708.07120). The rise is its warm-up."""

    rise: float = key(0.3, "fraction of training with a rising learning rate", gt=0, lt=1)


class ScheduleConfig(Table):
    """`[schedule]`: the learning rate over time, batch by batch."""

    agree = (("name", "warmup"),)
    kind: Constant | StepDecay | Exponential | Cosine | OneCycle = branch(Cosine, "the schedule")
    warmup: float = key(0.0, "epochs of linear warm-up from 0", ge=0)

    def check(self) -> None:
        """One-cycle has its own warm-up."""
        if isinstance(self.kind, OneCycle) and self.warmup:
            raise ConfigError("warmup", f"= {self.warmup:g}: must be 0, for one-cycle has its own (its key `rise`)")


class AugmentConfig(Table):
    """`[augment]`: augmentation of training images, drawn for each batch."""

    flip: float = key(0.0, "probability of a left-right flip", ge=0, le=1)
    crop: int = key(0, "maximum shift in pixels; the border is filled with zeros", ge=0)
    erase: float = key(0.0, "probability of erasing a rectangle (Zhong et al. 2020, arXiv 1708.04896)", ge=0, le=1)
    mixup: float = key(0.0, "alpha of MixUp (Zhang et al. 2018, arXiv 1710.09412); 0 is off", ge=0)
    cutmix: float = key(0.0, "alpha of CutMix (Yun et al. 2019, arXiv 1905.04899); 0 is off", ge=0)
    mix: float = key(1.0, "probability of mixing a batch; if both are on, each mixes half of these", ge=0, le=1)


class TrainConfig(Table):
    """`[train]`: the length of training, its batches, targets, averaged weights and precision."""

    epochs: int = key(10, "passes over the training part", ge=1)
    batch_size: int = key(128, "images per step", ge=1)
    label_smoothing: float = key(0.0, "fraction of the target spread over all classes", ge=0, lt=1)
    ema: float = key(
        0.0, "decay per step of averaged weights, lower in the first steps; these are validated; 0 is off", ge=0, lt=1
    )
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "auto: bfloat16 on cuda, and for nets without attention on CPUs that have it; else float32", fixed=True
    )
    seed: int | None = key(
        None, "seed of initialisation, data order and augmentation; default: by search.seed and trial", ge=0, fixed=True
    )


class Config(Table):
    """The config of one trial: everything that determines its training."""

    data: DataConfig = table(DataConfig)
    model: ModelConfig = table(ModelConfig)
    optimizer: OptimizerConfig = table(OptimizerConfig)
    schedule: ScheduleConfig = table(ScheduleConfig)
    augment: AugmentConfig = table(AugmentConfig)
    train: TrainConfig = table(TrainConfig)

    def fit_images(self, shape: Shape) -> None:
        """Checks the architecture against the images' (channels, height, width). Raises ConfigError."""
        try:
            self.model.kind.fit_images(shape)
        except ConfigError as error:
            raise error.under(f"model.{self.model.kind.tag}") from None

    def digest(self) -> str:
        """sha256 of the config without its seed. Twins have equal digests."""
        values = self.to_table()
        values["train"].pop("seed", None)
        return digest(values)


START = "default: a quarter of search.trials, from 4 to 10"


class Tpe(Table, tag="tpe"):
    """Tree-structured Parzen estimator (Bergstra et al. 2011; multivariate: Falkner et al. 2018)."""

    startup_trials: int | None = key(None, f"random trials before the first proposal of the model; {START}", ge=1)
    candidates: int = key(24, "candidates to compare for each proposal", ge=1)


class Random(Table, tag="random"):
    """Independent random draws (Bergstra & Bengio 2012)."""


class Grid(Table, tag="grid"):
    """Every point of a finite space, in order: trial i is point i."""


class CmaEs(Table, tag="cmaes"):
    """CMA-ES (Hansen 2016, arXiv 1604.00772); choices and branches are drawn at random."""

    startup_trials: int | None = key(None, f"random trials before the first proposal of the strategy; {START}", ge=1)


class Gp(Table, tag="gp"):
    """Gaussian process with log expected improvement (Ament et al. 2023, arXiv 2310.20708)."""

    startup_trials: int | None = key(None, f"random trials before the first proposal of the model; {START}", ge=1)


class Qmc(Table, tag="qmc"):
    """A scrambled Sobol sequence (Bergstra & Bengio 2012); choices and branches are drawn at random."""


class Median(Table, tag="median"):
    """Stops a trial whose best value so far is below the median of the others' at the same epoch."""

    startup_trials: int | None = key(None, f"trials that must end before the first is pruned; {START}", ge=0)
    min_epochs: int = key(1, "minimum epochs of every trial", ge=1)


class Percentile(Table, tag="percentile"):
    """Stops a trial outside the best `keep` percent at the same epoch."""

    keep: float = key(25.0, "percentage of trials that continue", gt=0, lt=100)
    startup_trials: int | None = key(None, f"trials that must end before the first is pruned; {START}", ge=0)
    min_epochs: int = key(1, "minimum epochs of every trial", ge=1)


class Hyperband(Table, tag="hyperband"):
    """Successive halving at several rates in parallel (Li et al. 2018, arXiv 1603.06560)."""

    min_epochs: int = key(1, "epochs before the first halving; there is none in the last third of the epochs", ge=1)
    reduction: int = key(3, "reduction factor: one of this many trials continues at each halving", ge=2)


class Asha(Table, tag="asha"):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934)."""

    min_epochs: int = key(1, "epochs before the first halving; there is none in the last third of the epochs", ge=1)
    reduction: int = key(4, "reduction factor: one of this many trials continues at each halving", ge=2)
    promote: bool = key(False, "pause every trial at each halving, and continue the best when a worker is free")


def rungs(min_epochs: int, reduction: int, epochs: int) -> list[int]:
    """The epochs after which halving judges trials: `min_epochs * reduction**k`, none in the last third of `epochs`."""
    found, rung = [], min_epochs
    while 3 * rung <= 2 * epochs:
        found.append(rung)
        rung *= reduction
    return found


class Patient(Table, tag="patient"):
    """Stops a trial after more than `patience` consecutive epochs below its own best."""

    patience: int = key(3, "consecutive epochs allowed below the best before them", ge=0)
    min_delta: float = key(0.0, "minimum difference in accuracy that counts as below", ge=0)


class NoPruner(Table, tag="none"):
    """Stops no trial."""


class SearchConfig(Table):
    """`[search]`: the number of trials, the sampler and the pruner."""

    trials: int | None = key(None, "number of trials, failed ones included; default: all of a grid, else 20", ge=1)
    target: float | None = key(None, "validation accuracy of a trial, 0 to 1, that ends the search", gt=0, le=1)
    stop_after: int | None = key(
        None, "complete and pruned trials after the best one, none of them better, that end the search", ge=1
    )
    seed: int = key(0, "seed of proposals and training", ge=0)
    sampler: Tpe | Random | Grid | CmaEs | Gp | Qmc = branch(Tpe, "proposes configs", inline=True)
    pruner: Median | Hyperband | Asha | Percentile | Patient | NoPruner = branch(Median, "prunes trials", inline=True)
    keep: int = key(3, "number of best trials to keep the weights of", ge=0)
    retries: int = key(2, "retries of a trial whose worker died", ge=0)
    checkpoint_seconds: float = key(5.0, "minimum seconds between two checkpoints of a trial", ge=0)
    hang_seconds: float = key(HANG_SECONDS, "seconds without a finished batch until a worker is killed", ge=10)


# Keys that may change between two commands on one study: they decide the length of a search, never a trial's result.
FREE = (
    "search.trials",
    "search.target",
    "search.stop_after",
    "search.keep",
    "search.retries",
    "search.checkpoint_seconds",
    "search.hang_seconds",
)
# Keys whose default depends on another key: a file without them goes on with what its study was begun with.
DEPENDENT = ("search.sampler.startup_trials", "search.pruner.startup_trials")


def image_shape(data: DataConfig) -> Shape | None:
    """(channels, height, width) of the images; None for a folder, whose images must be read first."""
    if data.name not in DATASETS:
        return None
    channels, height, width = DATASETS[data.name][0]
    return (channels, data.size or height, data.size or width)


def unknown_data(name: str) -> str:
    """The problem of a data set that is not there, for a message that begins with its key or flag."""
    meant = near(name, DATASETS)
    hint = f"; did you mean {meant}?" if meant else ""
    paths = "an existing folder of images (CLASS/*.png) or of parquet files (train-*.parquet), or an .npz file"
    return f"= {show(name)}: must be one of {', '.join(DATASETS)}, {paths}{hint}"


def _divisors(number: int) -> str:
    return f"({', '.join(str(i) for i in range(1, number + 1) if number % i == 0)})"
