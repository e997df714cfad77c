"""Keras Tuner's random search, with arrays in memory, as in its own examples. KERAS_BACKEND chooses the backend."""

import os
import sys

import keras
import keras_tuner
from work import MEAN, STD, Work, report

WORK = Work.read(sys.argv[1])
TRIALS: list[tuple[int, float]] = []  # steps and last accuracy of each


class Listed(keras_tuner.oracles.RandomSearchOracle):
    """Draws as the random search does, and then takes the values of the list, so that both sides train the same."""

    def populate_space(self, trial_id):
        answer = super().populate_space(trial_id)
        point = WORK.points[int(trial_id)]
        widths = {f"units_{i}": width for i, width in enumerate(point["widths"])}
        return {**answer, "values": {**answer["values"], "layers": len(widths), "lr": point["lr"], **widths}}


class Net(keras_tuner.HyperModel):
    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        keras.utils.set_random_seed(1000 * WORK.seed + len(TRIALS))
        model = keras.Sequential([keras.Input((28, 28)), keras.layers.Flatten()])
        for i in range(hp.Int("layers", 1, 3)):
            width = hp.Int(f"units_{i}", 64, 256)
            model.add(keras.layers.Dense(width, activation="relu", kernel_initializer="he_normal"))
        model.add(keras.layers.Dense(10))
        optimizer = keras.optimizers.Adam(hp.Float("lr", 1e-4, 1e-2, sampling="log"))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        return model

    def fit(self, hp, model, *arguments, **options):
        units = [layer.units for layer in model.layers if isinstance(layer, keras.layers.Dense)]
        assert units == [*WORK.points[len(TRIALS)]["widths"], 10], "the tuner took other values than the list's"
        history = model.fit(*arguments, **options)
        TRIALS.append((int(model.optimizer.iterations), history.history["val_accuracy"][-1]))
        return history


def use_one_thread() -> None:
    if os.environ["KERAS_BACKEND"] == "torch":
        import torch

        torch.set_num_threads(1)
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def main() -> None:
    if "--one-thread" in sys.argv:
        use_one_thread()
    oracle = Listed(objective=keras_tuner.Objective("val_accuracy", "max"), max_trials=len(WORK.points), seed=0)
    # RandomSearch is this class with its oracle.
    tuner = keras_tuner.Tuner(oracle, Net(), directory=str(WORK.folder), project_name="keras")
    (images, labels), (val_images, val_labels) = WORK.arrays("train"), WORK.arrays("val")
    images, val_images = (((each / 255.0 - MEAN) / STD).astype("float32") for each in (images, val_images))
    tuner.search(
        images,
        labels,
        validation_data=(val_images, val_labels),
        epochs=WORK.epochs,
        batch_size=WORK.batch_size,
        verbose=0,
    )
    report(TRIALS)


if __name__ == "__main__":
    main()
