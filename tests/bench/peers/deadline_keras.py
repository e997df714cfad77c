"""Keras Tuner's hyperband, with arrays in memory, as in its own examples. KERAS_BACKEND chooses the backend."""

import time

import deadline_work as work
import keras
import keras_tuner
from work import MEAN, STD

TASK = work.Task.parse()


class Stop(keras.callbacks.Callback):
    """Ends a training in an epoch, when the time is over."""

    def __init__(self, ends: float) -> None:
        super().__init__()
        self.ends = ends

    def on_train_batch_end(self, batch, logs=None):
        if time.monotonic() >= self.ends:
            self.model.stop_training = True


def build(hp: keras_tuner.HyperParameters) -> keras.Model:
    model = keras.Sequential([keras.Input((28, 28, 1))])
    for i in range(hp.Int("stages", *work.STAGES)):
        filters = hp.Choice(f"filters_{i}", work.FILTERS)
        for _ in range(hp.Int("convs", *work.CONVS)):
            model.add(keras.layers.Conv2D(filters, 3, padding="same"))
            model.add(keras.layers.BatchNormalization())
            model.add(keras.layers.ReLU())
        model.add(keras.layers.MaxPooling2D(2))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dropout(hp.Float("dropout", *work.DROPOUT)))
    model.add(keras.layers.Dense(10))
    optimizer = keras.optimizers.Adam(hp.Float("lr", *work.LR, sampling="log"))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


class Net(keras_tuner.HyperModel):
    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *arguments, **options):
        return model.fit(*arguments, batch_size=hp.Choice("batch_size", work.BATCHES), **options)


def arrays(part: str):
    images, labels = TASK.arrays(part)
    return ((images[..., None] / 255.0 - MEAN) / STD).astype("float32"), labels


def main() -> None:
    keras.utils.set_random_seed(TASK.seed)
    tuner = keras_tuner.Hyperband(
        Net(),
        objective=keras_tuner.Objective("val_accuracy", "max"),
        max_epochs=TASK.epochs,
        hyperband_iterations=100,
        seed=TASK.seed,
        directory=str(TASK.folder),
        project_name="keras",
    )
    propose = tuner.oracle.populate_space

    def propose_in_time(trial_id):
        return {"status": "STOPPED"} if time.monotonic() >= TASK.search_ends else propose(trial_id)

    tuner.oracle.populate_space = propose_in_time
    images, labels = arrays("train")
    tuner.search(images, labels, validation_data=arrays("val"), callbacks=[Stop(TASK.search_ends)], verbose=0)
    best = tuner.oracle.get_best_trials(1)[0]
    model = tuner.get_best_models(1)[0]
    if TASK.retrains:
        model = build(best.hyperparameters)
        images, labels = arrays("all")
        size = best.hyperparameters.get("batch_size")
        model.fit(images, labels, epochs=TASK.epochs, batch_size=size, callbacks=[Stop(TASK.ends)], verbose=0)
    _, test = model.evaluate(*arrays("test"), verbose=0)
    work.answer(test, best.score, len(tuner.oracle.trials))


if __name__ == "__main__":
    main()
