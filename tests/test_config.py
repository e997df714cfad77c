"""The config of one trial."""

import tomllib
from dataclasses import replace
from typing import Any

import pytest
import tomli_w

from searchfm.config import DATASETS, Config, Custom, DataConfig, Model, ModelConfig, Shape, TrainConfig, image_shape
from searchfm.errors import ConfigError
from searchfm.tables import BranchKey, FreeKey, LeafKey, Table, TableKey


def read(text: str) -> Config:
    return Config.from_table(tomllib.loads(text))


def tables(cls: type[Table]) -> list[type[Table]]:
    """The table and all below it."""
    below: list[type[Table]] = []
    for item in cls.schema.values():
        match item:
            case TableKey():
                below.append(item.table)
            case BranchKey():
                below += item.options.values()
    return [cls, *(inner for table in below for inner in tables(table))]


NEEDED: dict[type[Table], dict[str, Any]] = {Custom: {"factory": "nets:net"}}  # keys without a default


@pytest.mark.parametrize("kind", tables(ModelConfig)[1:])
def test_every_architecture_goes_to_toml_and_back(kind: type[Table]) -> None:
    name = kind.tag
    config = Config.from_table({"model": {"name": name, name: NEEDED.get(kind, {})}})
    assert config.model.kind.tag == name
    assert Config.from_table(tomllib.loads(tomli_w.dumps(config.to_table()))) == config


@pytest.mark.parametrize("cls", tables(Config))
def test_every_key_is_documented_and_its_default_is_possible(cls: type[Table]) -> None:
    assert cls.__doc__
    needed = NEEDED.get(cls, {})
    assert cls.from_table(needed) == cls(**needed)
    for name, item in cls.schema.items():
        match item:
            case LeafKey(doc=doc) | FreeKey(doc=doc) | BranchKey(chooser=LeafKey(doc=doc)):
                assert doc, f"{cls.__name__}.{name}"
    for name in (name for group in cls.agree for name in group):
        assert name in cls.schema


WRONG = [
    (
        "model.vit = { hidden_dim = 16, heads = 3 }\nmodel.name = 'vit'",
        "model.vit.heads = 3 must divide hidden_dim = 16 (1, 2, 4, 8, 16)",
    ),
    ("model.name = 'cnn'\nmodel.cnn.kernel = 4", "model.cnn.kernel = 4: must be odd"),
    (
        "optimizer.name = 'sgd'\noptimizer.sgd = { momentum = 0.0, nesterov = true }",
        "optimizer.sgd.nesterov = true needs momentum > 0",
    ),
    ("schedule = { name = 'one-cycle', warmup = 1.5 }", "schedule.warmup = 1.5: must be 0, for one-cycle has its own"),
    ("data.subset = 0", "data.subset = 0.0: must be a number > 0 and <= 1"),
    ("data.validation = 1.0", "data.validation = 1.0: must be a number > 0 and < 1"),
    ("data.size = 5000", "data.size = 5000: must be a whole number >= 0 and <= 1024"),
    ("train.epochs = 0", "train.epochs = 0: must be a whole number >= 1"),
    ("optimizer.lr = 0", "optimizer.lr = 0.0: must be a number > 0"),
    ("optimizer.name = 'adamx'", '"adamx": must be one of "sgd", "adagrad", "rmsprop", "adam", "adamw"'),
    ("train.precision = 'float16'", 'train.precision = "float16": must be one of "auto", "float32", "bfloat16"'),
    (
        "model.name = 'transfer'\nmodel.transfer.tuned_blocks = 'some'",
        'tuned_blocks = "some": must be a whole number >= 0 or "all"',
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_cannot_be_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert message in str(caught.value)


IMAGES = [
    ("model.name = 'cnn'\nmodel.cnn.stages = 5", (3, 32, 32), None),
    ("model.name = 'cnn'\nmodel.cnn.stages = 6", (3, 32, 32), "pool halves images of 32x32 pixels 6 times"),
    ("model.name = 'cnn'\nmodel.cnn = { stages = 9, pool = 'max-same' }", (3, 32, 32), None),
    ("model.name = 'cnn'\nmodel.cnn.stages = 4", (1, 28, 28), None),
    ("model.name = 'cnn'\nmodel.cnn.stages = 4", (1, 40, 8), "pool halves images of 40x8 pixels 4 times"),
    ("model.name = 'vit'\nmodel.vit.patch_size = 7", (1, 28, 28), None),
    (
        "model.name = 'vit'\nmodel.vit.patch_size = 5",
        (1, 28, 28),
        "patch_size = 5 must divide the images' side of 28 pixels (1, 2, 4, 7, 14, 28)",
    ),
    (
        "model.name = 'vit'\nmodel.vit.patch_size = 7",
        (1, 28, 30),
        "patch_size = 7 must divide the images' side of 30 pixels",
    ),
    ("model.name = 'residual'\nmodel.residual.stages = 4", (1, 8, 8), None),
    (
        "model.name = 'residual'\nmodel.residual.stages = 5",
        (1, 8, 8),
        "stages = 5: halves images of 8x8 pixels to nothing",
    ),
    ("model.name = 'mlp'", (1, 1, 1), None),
]


@pytest.mark.parametrize(("text", "shape", "message"), IMAGES)
def test_an_architecture_that_does_not_fit_the_images_is_named(
    text: str, shape: tuple[int, int, int], message: str | None
) -> None:
    config = read(text)
    if message is None:
        config.fit_images(shape)
    else:
        with pytest.raises(ConfigError) as caught:
            config.fit_images(shape)
        assert str(caught.value).startswith(f"model.{config.model.kind.tag}.{message}")


def test_every_architecture_is_checked_against_the_images() -> None:
    assert all(issubclass(option, Model) for option in tables(ModelConfig)[1:])

    class Picky(Model, tag="picky"):  # the check of a new architecture is called without being listed anywhere
        def fit_images(self, shape: Shape) -> None:
            raise ConfigError("depth", f"does not fit {shape}")

    with pytest.raises(ConfigError, match=r"^model\.picky\.depth does not fit \(1, 8, 8\)$"):
        Config(model=ModelConfig(kind=Picky())).fit_images((1, 8, 8))


def test_twins_are_equal_but_for_their_seed() -> None:
    config = read("train = { seed = 1, epochs = 3 }")
    assert replace(config, train=replace(config.train, seed=2)).digest() == config.digest()
    assert replace(config, train=replace(config.train, seed=None)).digest() == config.digest()
    assert replace(config, train=replace(config.train, epochs=4)).digest() != config.digest()
    assert replace(config, data=replace(config.data, seed=1)).digest() != config.digest()  # another split
    assert Config(train=TrainConfig(epochs=3)).digest() == config.digest()


def test_a_digest_stays_what_it_is() -> None:
    """Stored studies find twins by it: if it changes, the format number must change."""
    config = Config.from_table({"schedule": {"name": "constant"}})  # the default where this digest was written
    assert config.digest() == "2f7c05a7e642aa0d93f2950175287cfcc99fdebeaf58910a3b9887016796039b"


@pytest.mark.parametrize("name", DATASETS)
def test_the_shape_of_built_in_images(name: str) -> None:
    shape = image_shape(DataConfig(name=name))
    assert shape == DATASETS[name][0]
    assert image_shape(DataConfig(name=name, size=64)) == (shape[0], 64, 64)
    assert image_shape(DataConfig(name="some/folder")) is None


def test_keys_of_the_whole_study_cannot_be_ranges() -> None:
    def ranges(cls: type[Table]) -> set[str]:
        return {name for name, item in cls.schema.items() if isinstance(item, LeafKey) and not item.fixed}

    assert not ranges(DataConfig)
    assert "seed" not in ranges(TrainConfig)
    assert "batch_size" in ranges(TrainConfig)
