"""The training loop."""

import hashlib
import math
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from searchfm.config import Config, TrainConfig
from searchfm.errors import ConfigError, DivergedError, SearchfmError
from searchfm.learn import features, graphs, optim, precision
from searchfm.learn.augment import augment
from searchfm.learn.checkpoint import Checkpoint
from searchfm.learn.data import Part, Splits, batches
from searchfm.learn.models import Classifier, classifier
from searchfm.learn.models.custom import NO_CODE, Code
from searchfm.learn.models.transfer import Pretrained
from searchfm.learn.precision import Precision
from searchfm.records import NUMERICS, Epoch, Predictions

# The stream of augmentation. The name is part of the numbers: another one would change every stored trial.
_AUGMENTATION = bytes.fromhex("74726561746d656e7473").decode()

TIMED_SECONDS, TIMED_BATCHES = 0.05, 32  # that `epoch_seconds` times: at least, at most
FIRST_SECONDS = 2.0  # of a first batch, up to which others are timed in any case


class Training(Iterator[Epoch]):
    """The training of one config, from the start or from a checkpoint. Each `next` trains an epoch, validates, and
    returns its record.

    data: as `learn.data.load` returns it for the same device; without a validation part the epochs' val_* are None.
    tick: called every batch, in training and validation; an exception from it abandons the unfinished epoch.
    code: whether the user's code may run, and which. bfloat16: the architectures that "auto" trains in it on a CPU.
    part_of: where `data` are a few images to time a training with, all of them.
    Raises ConfigError or ModelError at once where config and data do not fit, DataError for variables; DivergedError
    while iterating.

    Between two epochs `model` is the model in training, `classifier` the one to keep (with averaged weights if the
    config averages), `validation` the last evaluation, in the `precision` of the training, `numerics` those of all
    epochs, and `checkpoint()` all that resuming needs.

    Every epoch has its own seeds, derived from `config.train.seed` (0 where there is none) and its index: for the order
    of the images, for augmentation, and for torch's global generator (dropout), whose state is restored afterwards. So
    training resumed after an epoch is bitwise equal to uninterrupted training, on a CPU with as many threads.
    """

    def __init__(
        self,
        config: Config,
        data: Splits,
        *,
        device: torch.device | str = "cpu",
        resume: Checkpoint | None = None,
        tick: Callable[[], None] = lambda: None,
        code: Code = NO_CODE,
        bfloat16: Collection[str] = (),
        part_of: Splits | None = None,
    ) -> None:
        self.config, self.data, self.device = config, data, torch.device(device)
        self._tick = tick
        self.shape = (int(data.train.images.shape[1]), int(data.train.images.shape[2]), int(data.train.images.shape[3]))
        config.fit_images(self.shape)
        self._seed = config.train.seed or 0
        seed, classes = _derive(self._seed, "weights"), len(data.classes)
        self.model = classifier(
            config.model, self.shape, classes, data.mean, data.std, seed=seed, device=self.device, code=code
        )
        self.precision: Precision = precision.choose(config, self.model, self.shape, bfloat16)
        self._count = _whole_batches(len(data.train.labels), config.train, self.model)
        self._recorded: graphs.Recorded[None] | None = None
        self._recorded_val: graphs.Recorded[tuple[Tensor, Tensor]] | None = None
        if graphs.suits(config, self.device):
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._recorded, self._recorded_val = graphs.Recorded(stream), graphs.Recorded(stream)
        self._optimizer = optim.optimizer(self.model, config.optimizer, recorded=self._recorded is not None)
        self._average = optim.Average(self.model, config.train.ema) if config.train.ema else None
        # Of the epoch in training, on the device: the sum of losses, and the number of correct predictions.
        self._loss_sum, self._correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        self.validation: tuple[float, Predictions] | None = None
        self.epochs: list[Epoch] = []
        self.numerics: tuple[int, ...] = (NUMERICS,)
        if resume is not None:
            self._restore(resume)
        casts = partial(precision.autocast, self.precision, self.device)
        self._features = features.find(
            self.model, data, config.augment, casts, tick, restored=resume is not None, part_of=part_of
        )
        self._net = self._trained(self.model)
        self._judged = self._trained(self.classifier) if self._average else self._net

    @property
    def frozen_seconds(self) -> float:
        """Seconds that the frozen stages took for the training images, whoever computed their features; 0 if they are
        computed in every epoch.
        """
        return self._features.seconds if self._features else 0.0

    @property
    def missing_features(self) -> Mapping[str, float]:
        """Seconds that the frozen stages take for all images of `part_of`, by the files that the cache lacks."""
        return self._features.missing if self._features else {}

    @property
    def classifier(self) -> Classifier:
        """The model that is validated and kept."""
        return self._average.model if self._average else self.model

    def __next__(self) -> Epoch:
        """Trains the next epoch. Raises StopIteration after the last, DivergedError if a loss is not finite."""
        index, started = len(self.epochs) + 1, time.perf_counter()
        if index > self.config.train.epochs:
            raise StopIteration
        loss, accuracy, lr = self._pass(index)
        trained = time.perf_counter()
        _finite("train_loss", loss, index)
        self.validation = self.validate()
        val_loss = val_accuracy = None
        if self.validation is not None:
            val_loss, predictions = self.validation
            val_accuracy = float(predictions.correct.mean())
            _finite("val_loss", val_loss, index)
        epoch = Epoch(
            index=index,
            train_loss=loss,
            train_accuracy=accuracy,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            lr=lr,
            seconds=time.perf_counter() - started,
            samples_per_second=self._count / (trained - started),
            time=time.time(),
        )
        self.epochs.append(epoch)
        return epoch

    def _pass(self, index: int) -> tuple[float, float, float]:
        """One pass over the training part: mean loss, accuracy, last learning rate. Waits for the device at its end."""
        loss_sum, correct, factor = self._steps(index)
        return loss_sum.item() / self._count, correct.item() / self._count, self.config.optimizer.lr * factor

    def _steps(self, index: int) -> tuple[Tensor, Tensor, float]:
        """All steps of an epoch, none of which waits for the device: scalars on the device, the sum of the losses and
        the number of correct predictions; and the last factor of the learning rate.
        """
        config, device = self.config, self.device
        steps = math.ceil(self._count / config.train.batch_size)
        factor = 0.0
        self._loss_sum.zero_()
        self._correct.zero_()
        self.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_derive(self._seed, "dropout", index))
            for i, (inputs, targets) in enumerate(self._batches(index)):
                self._tick()
                step = (index - 1) * steps + i
                factor = optim.lr_factor(step, steps, config.train.epochs * steps, config.schedule)
                optim.set_lr(self._optimizer, factor)
                if self._recorded:
                    self._recorded(self._step, inputs, targets)
                else:
                    self._step(inputs, targets)
                if self._average:
                    self._average.update(step)
        return self._loss_sum, self._correct, factor

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        """A step of the optimizer on a batch. May be recorded: what differs between two steps is in tensors."""
        config = self.config
        with precision.autocast(self.precision, self.device):
            logits = self._net(inputs)
            loss = F.cross_entropy(logits, targets, label_smoothing=config.train.label_smoothing)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        if config.optimizer.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip)
        self._optimizer.step()
        with torch.no_grad():
            self._loss_sum += loss * len(inputs)
            # Of a mixed image, the class with the larger weight is the correct one.
            expected = targets if targets.ndim == 1 else targets.argmax(1)
            self._correct += (logits.argmax(1) == expected).sum()

    def _batches(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the trained part of the model takes, images or cached features, augmented; and the targets."""
        data, config, size = self.data, self.config.augment, self.config.train.batch_size
        order = torch.randperm(len(data.train), generator=_generator(self._seed, "order", index))[: self._count]
        generator = _generator(self._seed, _AUGMENTATION, index, device=self.device)
        if self._features:
            yield from self._features.batches(size, order, config.flip, generator)
            return
        for images, labels in batches(data.train, size, order):
            yield augment(images, labels, len(data.classes), config, generator)

    def _trained(self, model: Classifier) -> nn.Module:
        """What of a classifier takes the batches."""
        return self._features.trained(model) if self._features else model

    def validate(self) -> tuple[float, Predictions] | None:
        """Evaluates on the validation part; None where nothing is held out."""
        part = self._features.val if self._features else self.data.val
        if part is None:
            return None
        return evaluate(self._judged, part, self.config.train, self._tick, self.precision, self._recorded_val)

    def checkpoint(self) -> Checkpoint:
        """All that resuming from here needs, copied but for what is frozen: later epochs do not change it."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self._average:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.model.state_dict().items()}
        net = self.model.net
        names = net.fixed if isinstance(net, Pretrained) else ()
        fixed = {f"{model}.net.{name}" for model in ("model", "average") for name in names}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optim.state(self._optimizer).items()}
        copies = {
            name: tensor.detach() if name in fixed else tensor.detach().clone() for name, tensor in tensors.items()
        }
        return Checkpoint(tuple(self.epochs), copies, self.numerics)

    def _restore(self, checkpoint: Checkpoint) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        if isinstance(self.model.net, Pretrained):
            self.model.net.unshare()
        self.model.load_state_dict(under("model."))
        if self._average:
            self._average.model.load_state_dict(under("average."))
        optim.restore(self._optimizer, under("optimizer."))
        self.epochs = list(checkpoint.epochs)
        self.numerics = tuple(dict.fromkeys([*checkpoint.numerics, NUMERICS]))


def epoch_seconds(
    config: Config,
    data: Splits,
    seconds: float,
    *,
    device: torch.device | str = "cpu",
    tick: Callable[[], None] = lambda: None,
    code: Code = NO_CODE,
    bfloat16: Collection[str] = (),
) -> tuple[float, float, Mapping[str, float]] | None:
    """Seconds of an epoch's training, and of the validation after it, timed on a few batches; and
    `Training.missing_features`. None where the config cannot be trained. data, device, tick, code, bfloat16: as
    those of `Training`.

    The first batch of a training is slower, that of a process four to six times (on busy cores). Its time is only
    taken if it took longer than FIRST_SECONDS and there are no `seconds` left for others, and never on a GPU, where it
    loads libraries and kernels, and where steps are recorded after the first few.
    """
    gpu = torch.device(device).type != "cpu"

    def train(batches: int) -> Training:
        size = batches * config.train.batch_size
        few = replace(data, train=_first(data.train, size), val=data.val and _first(data.val, size))
        return Training(longer, few, device=device, tick=tick, code=code, bfloat16=bfloat16, part_of=data)

    # Epochs of at least one batch that are not timed. Those of training and of validation are then recorded.
    untimed = graphs.EAGER + 1 if gpu else 1
    longest = max(untimed + 2, config.train.epochs)
    longer, began = replace(config, train=replace(config.train, epochs=longest)), time.monotonic()
    try:
        training = train(1)
        epoch = next(training)
        if gpu:
            epoch = list(islice(training, untimed))[-1]
        if gpu or epoch.seconds < FIRST_SECONDS or time.monotonic() - began + epoch.seconds < seconds:
            if epoch.seconds < TIMED_SECONDS:
                training = train(min(TIMED_BATCHES, math.ceil(TIMED_SECONDS / epoch.seconds)))
                list(islice(training, untimed))
            epoch = next(training)
    except (SearchfmError, RuntimeError, MemoryError) as error:  # diverged, or out of memory, as in a trial
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        return None
    count, held = training._count, training.data.val
    trained = count / epoch.samples_per_second
    validated = 0.0 if data.val is None or held is None else (epoch.seconds - trained) * len(data.val) / len(held)
    return trained * len(data.train) / count, validated, training.missing_features


def _first(part: Part, size: int) -> Part:
    return replace(part, images=part.images[:size], labels=part.labels[:size], indices=part.indices[:size])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    part: Part,
    config: TrainConfig,
    tick: Callable[[], None],
    computed: Precision = "float32",
    recorded: graphs.Recorded[tuple[Tensor, Tensor]] | None = None,
) -> tuple[float, Predictions]:
    """Mean cross-entropy (no smoothing) and predictions, computed in a precision. The model, on the part's device,
    stays in eval mode. recorded: runs the batches; the same one for the same model alone.
    """
    device = part.device
    loss_sum = torch.zeros((), device=device)
    rows: list[Tensor] = []

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with precision.autocast(computed, device):
            logits = model(images).float()
        return logits, F.cross_entropy(logits, labels, reduction="sum")

    model.eval()
    for images, labels in batches(part, config.batch_size, None):
        tick()
        logits, loss = recorded(step, images, labels) if recorded else step(images, labels)
        loss_sum += loss
        rows.append(logits.clone() if recorded else logits)
    probabilities = torch.cat(rows).softmax(1).cpu().numpy()
    return loss_sum.item() / len(part), Predictions(part.indices.numpy(), part.labels.cpu().numpy(), probabilities)


def _whole_batches(images: int, config: TrainConfig, model: nn.Module) -> int:
    """The images an epoch uses: all but a last batch of one if the model has batch norm: one image has no variance."""
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return images
    if min(images, config.batch_size) == 1:
        raise ConfigError("train.batch_size", f"= {config.batch_size}: batch norm needs at least 2 images a batch")
    return images - 1 if images % config.batch_size == 1 else images


def _derive(seed: int, use: str, index: int = 0) -> int:
    """A seed of 63 bits for one use of a trial's seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{index}".encode()).digest()[:8], "big") >> 1


def _generator(seed: int, use: str, index: int, *, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(_derive(seed, use, index))


def _finite(what: str, loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"{what} is {loss} in epoch {epoch}; a lower optimizer.lr, or optimizer.clip, may help")
