"""What one trial is: frozen dataclasses with their checks and defaults, and nothing but the standard library.

The same classes read a study file (where a leaf may be a range, see `search/space.py`), a trial's `config.toml` and the
payload of a job, so a key means one thing everywhere. Defaults live here and nowhere else.
"""

from typing import Any, Literal

from searchfm.errors import ConfigError
from searchfm.tables import Table, branch, digest, key, table

Shape = tuple[int, int, int]  # channels, height, width

# What is known of a data set before it is read: the shape of an image and the number of classes. A folder of images
# is known only after it was read.
DATASETS: dict[str, tuple[Shape, int]] = {
    "fashion-mnist": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "digits": ((1, 8, 8), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}


class DataConfig(Table):
    """`[data]`: which images, and which share of them. The same for every trial of a study."""

    name: str = key("fashion-mnist", "a data set by name, or the path of a folder of images", fixed=True)
    subset: float = key(1.0, "share of the training part used, after validation was taken out", gt=0, le=1, fixed=True)
    validation: float = key(0.15, "share of the training part held out to compare trials on", gt=0, lt=1, fixed=True)
    seed: int = key(0, "seed of the two shares above", ge=0, fixed=True)
    size: int = key(0, "side in pixels that images are resized to, once; 0 keeps their own", ge=0, le=1024, fixed=True)


# --- models -----------------------------------------------------------------------------------------------------------


class Mlp(Table):
    """Fully connected layers, each followed by batch norm (if asked for), ReLU and dropout."""

    tag = "mlp"
    layers: int = key(2, "hidden layers", ge=0, le=64)
    width: tuple[int, ...] = key(200, "units of each hidden layer", ge=1, per="layers")
    dropout: float = key(0.0, "probability of dropping a unit after each hidden layer", ge=0, lt=1)
    batch_norm: bool = key(False, "batch norm before each ReLU")


class Cnn(Table):
    """Stages of convolutions, each stage followed by its pooling; then dense layers."""

    tag = "cnn"
    agree = (("stages", "pool"), ("kernel",))
    stages: int = key(2, "stages; a stage is `convs` convolutions and one pooling", ge=1, le=32)
    filters: tuple[int, ...] = key(32, "filters of each stage's convolutions", ge=1, per="stages")
    convs: int = key(1, "convolutions a stage", ge=1, le=8)
    kernel: int = key(3, "side of the convolutions' kernel in pixels, odd", ge=1, le=15)
    pool: tuple[Literal["none", "max", "average", "max-same"], ...] = key(
        "max",
        "after each stage: 2x2 pooling that halves the image, or `max-same`, 3x3 that keeps its size",
        per="stages",
    )
    batch_norm: bool = key(False, "batch norm before each ReLU")
    conv_dropout: float = key(0.0, "probability of dropping a whole filter after each stage", ge=0, lt=1)
    head: Literal["flatten", "average"] = key("flatten", "how the last stage's maps reach the dense layers")
    dense_layers: int = key(0, "hidden dense layers between the convolutions and the classes", ge=0, le=16)
    dense_width: tuple[int, ...] = key(100, "units of each hidden dense layer", ge=1, per="dense_layers")
    dropout: float = key(
        0.0, "probability of dropping a unit before each dense layer but the first of several", ge=0, lt=1
    )

    def fit(self) -> None:
        """The kernel is odd, so that images keep their size."""
        if self.kernel % 2 == 0:
            raise ConfigError("kernel", f"= {self.kernel}: must be odd")

    def fit_images(self, shape: Shape) -> None:
        """No more halvings than the image allows."""
        halvings = sum(pool in ("max", "average") for pool in self.pool)
        if min(shape[1:]) >> halvings < 1:
            raise ConfigError(
                "pool",
                f"halves images of {shape[1]}x{shape[2]} pixels {halvings} times, to nothing; use fewer stages,"
                ' or "none" or "max-same" for some',
            )


class Vit(Table):
    """A vision transformer from scratch (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

    tag = "vit"
    agree = (("patch_size",), ("hidden_dim", "heads"))
    patch_size: int = key(4, "side of a patch in pixels; divides the images' side", ge=1)
    hidden_dim: int = key(64, "width of a token", ge=1)
    layers: int = key(6, "encoder layers", ge=1, le=64)
    heads: int = key(4, "attention heads; divides hidden_dim", ge=1)
    mlp_ratio: float = key(4.0, "width of an encoder layer's MLP over hidden_dim", gt=0, le=16)
    dropout: float = key(0.0, "probability of dropping after embedding, projection and MLP", ge=0, lt=1)
    pooling: Literal["token", "average"] = key("token", "what the classes are read from: class token or mean of tokens")

    def fit(self) -> None:
        """Heads share hidden_dim evenly."""
        if self.hidden_dim % self.heads:
            raise ConfigError(
                "heads", f"= {self.heads} must divide hidden_dim = {self.hidden_dim} {_divisors(self.hidden_dim)}"
            )

    def fit_images(self, shape: Shape) -> None:
        """Patches cover the image; timm would silently drop what is left over."""
        side = next((side for side in shape[1:] if side % self.patch_size), 0)
        if side:
            raise ConfigError(
                "patch_size", f"= {self.patch_size} must divide the images' side of {side} pixels {_divisors(side)}"
            )


class Transfer(Table):
    """Any timm model by name, of which the head and the last `tuned_blocks` stages are trained."""

    tag = "transfer"
    model: str = key("resnet18", "name of a timm model")
    tuned_blocks: int | Literal["all"] = key(
        0, 'stages trained, from the top; 0 is the head only, "all" everything', ge=0
    )
    weights: str = key("hub", '"hub", "none", or the path of a .safetensors or .pth file')
    dropout: float = key(0.0, "probability of dropping a feature before the head", ge=0, lt=1)
    layer_decay: float = key(1.0, "learning rate of a stage over that of the stage above it", gt=0, le=1)


class Residual(Table):
    """A residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2): a 3x3 stem and stages
    of residual blocks; each stage but the first halves the image.
    """

    tag = "residual"
    agree = (("stages",),)
    stages: int = key(3, "stages of residual blocks", ge=1, le=6)
    blocks: int = key(2, "residual blocks a stage", ge=1, le=64)
    block: tuple[Literal["basic", "bottleneck"], ...] = key("basic", "kind of each stage's blocks", per="stages")
    width: int = key(16, "filters of the first stage; each further stage doubles them", ge=1)
    dropout: float = key(0.0, "probability of dropping a unit before the classes", ge=0, lt=1)

    def fit_images(self, shape: Shape) -> None:
        """No more halvings than the image allows."""
        if min(shape[1:]) >> (self.stages - 1) < 1:
            raise ConfigError("stages", f"= {self.stages}: halves images of {shape[1]}x{shape[2]} pixels to nothing")


class ModelConfig(Table):
    """`[model]`: the architecture."""

    kind: Mlp | Cnn | Vit | Transfer | Residual = branch(Mlp, "the architecture")


# --- optimisation -----------------------------------------------------------------------------------------------------


class Sgd(Table):
    """Stochastic gradient descent."""

    tag = "sgd"
    momentum: float = key(0.9, "momentum", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov's momentum")

    def fit(self) -> None:
        """torch refuses Nesterov without momentum."""
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov", "= true needs momentum > 0")

    agree = (("momentum", "nesterov"),)


class Adagrad(Table):
    """Adagrad (Duchi et al. 2011)."""

    tag = "adagrad"
    lr_decay: float = key(0.0, "decay of the learning rate with each step", ge=0)


class Rmsprop(Table):
    """RMSprop (Hinton 2012)."""

    tag = "rmsprop"
    alpha: float = key(0.99, "smoothing of the squared gradients", ge=0, lt=1)
    momentum: float = key(0.0, "momentum", ge=0, lt=1)


class Adam(Table):
    """Adam (Kingma & Ba 2015, arXiv 1412.6980); weight_decay is L2 in the gradient."""

    tag = "adam"
    beta1: float = key(0.9, "smoothing of the gradient", ge=0, lt=1)
    beta2: float = key(0.999, "smoothing of the squared gradient", ge=0, lt=1)


class AdamW(Table):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    tag = "adamw"
    beta1: float = key(0.9, "smoothing of the gradient", ge=0, lt=1)
    beta2: float = key(0.999, "smoothing of the squared gradient", ge=0, lt=1)


class OptimizerConfig(Table):
    """`[optimizer]`."""

    kind: Sgd | Adagrad | Rmsprop | Adam | AdamW = branch(AdamW, "the optimizer")
    lr: float = key(1e-3, "learning rate, at its highest", gt=0)
    weight_decay: float = key(
        0.0, "decoupled for adamw, else L2 in the gradient; never on biases, norms or embeddings of position", ge=0
    )
    clip: float = key(0.0, "norm that gradients are clipped to; 0 leaves them", ge=0)


class Constant(Table):
    """The learning rate stays."""

    tag = "constant"


class StepDecay(Table):
    """The learning rate is multiplied by `factor` every `every` epochs."""

    tag = "step"
    every: int = key(5, "epochs between two steps", ge=1)
    factor: float = key(0.5, "what a step multiplies by", gt=0, le=1)


class Exponential(Table):
    """The learning rate is multiplied by `factor` an epoch, batch by batch."""

    tag = "exponential"
    factor: float = key(0.9, "what an epoch multiplies by", gt=0, le=1)


class Cosine(Table):
    """Half a cosine from the learning rate down to `floor` of it (Loshchilov & Hutter 2017, arXiv 1608.03983)."""

    tag = "cosine"
    floor: float = key(0.0, "last learning rate over the highest", ge=0, le=1)


class OneCycle(Table):
    """Up and down again in one cycle (Smith & Topin 2018, arXiv 1708.07120); has its own warm-up."""

    tag = "one-cycle"
    rise: float = key(0.3, "share of training that the learning rate rises for", gt=0, lt=1)


class ScheduleConfig(Table):
    """`[schedule]`: the learning rate over time, batch by batch."""

    agree = (("name", "warmup"),)
    kind: Constant | StepDecay | Exponential | Cosine | OneCycle = branch(Constant, "the schedule")
    warmup: float = key(0.0, "epochs of linear rise from nothing at the start", ge=0)

    def fit(self) -> None:
        """One-cycle brings its own warm-up, and needs no second one."""
        if isinstance(self.kind, OneCycle) and self.warmup:
            raise ConfigError("warmup", f"= {self.warmup:g}: must be 0, for one-cycle has its own (its key `rise`)")


class AugmentConfig(Table):
    """`[augment]`: what is done to training images, afresh in every batch."""

    flip: float = key(0.0, "probability of a left-right flip", ge=0, le=1)
    crop: int = key(0, "largest shift in pixels, the border filled with zeros", ge=0)
    erase: float = key(0.0, "probability of erasing a rectangle (Zhong et al. 2020, arXiv 1708.04896)", ge=0, le=1)
    mixup: float = key(0.0, "alpha of MixUp (Zhang et al. 2018, arXiv 1710.09412); 0 is off", ge=0)
    cutmix: float = key(0.0, "alpha of CutMix (Yun et al. 2019, arXiv 1905.04899); 0 is off", ge=0)
    mix: float = key(1.0, "probability that a batch is mixed; where both are on, each gets half", ge=0, le=1)


class TrainConfig(Table):
    """`[train]`."""

    epochs: int = key(10, "passes over the training part", ge=1)
    batch_size: int = key(128, "images a step", ge=1)
    label_smoothing: float = key(0.0, "share of the target spread over all classes", ge=0, lt=1)
    ema: float = key(0.0, "decay a step of the averaged weights, which are then validated; 0 is off", ge=0, lt=1)
    precision: Literal["auto", "float32", "bfloat16"] = key(
        "auto", "auto is bfloat16 on cuda, float32 elsewhere", fixed=True
    )
    seed: int | None = key(
        None,
        "seed of weights, order and treatments; from the study's seed and the trial's number unless given",
        ge=0,
        fixed=True,
    )


class Config(Table):
    """One trial: everything that decides what training does."""

    data: DataConfig = table(DataConfig)
    model: ModelConfig = table(ModelConfig)
    optimizer: OptimizerConfig = table(OptimizerConfig)
    schedule: ScheduleConfig = table(ScheduleConfig)
    augment: AugmentConfig = table(AugmentConfig)
    train: TrainConfig = table(TrainConfig)

    def fit_images(self, shape: Shape) -> None:
        """Checks the architecture against the images' (channels, height, width). Raises ConfigError."""
        kind = self.model.kind
        if isinstance(kind, Cnn | Vit | Residual):
            try:
                kind.fit_images(shape)
            except ConfigError as error:
                raise error.under(f"model.{kind.tag}") from None

    def digest(self) -> str:
        """sha256 of the config without its seed: equal digests are twins."""
        values: dict[str, Any] = self.to_table()
        values["train"] = {name: value for name, value in values["train"].items() if name != "seed"}
        return digest(values)


def image_shape(data: DataConfig) -> Shape | None:
    """(channels, height, width) of the images, or None where only reading the folder can tell."""
    if data.name not in DATASETS:
        return None
    channels, height, width = DATASETS[data.name][0]
    return (channels, data.size or height, data.size or width)


def _divisors(number: int) -> str:
    return f"({', '.join(str(i) for i in range(1, number + 1) if number % i == 0)})"
