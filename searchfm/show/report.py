"""`searchfm report`: one page that says what a study asked, what came of it, and how sure one may be."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
from markupsafe import Markup
from optuna.storages import BaseStorage

from searchfm import plots
from searchfm.config import DataConfig
from searchfm.errors import DataError, StudyError
from searchfm.learn.datasets import training_images
from searchfm.search.history import StudyRow, TrialRow, read_epochs
from searchfm.search.space import Choice, Range, leaves
from searchfm.search.study import Study
from searchfm.show import findings, page, words
from searchfm.show.findings import Predictions, Rank, seconds_per_epoch
from searchfm.show.terminal import figure, seconds, short_names, show_params

RANKED = 15  # trials in the picture of which are better
KEYS = 10  # axes of the parallel coordinates
TOP = 5  # trials whose curves are in colour
SECTIONS = {
    "history": "The search",
    "tie": "Which trials are better",
    "space": "What mattered",
    "factors": "One key at a time",
    "curves": "Learning curves",
    "errors": "What it gets wrong",
    "trials": "All trials",
    "reproduce": "To get this again",
}


def report(study: StudyRow, storage: BaseStorage, environment: Mapping[str, str], data_dir: Path | None = None) -> str:
    """The page, whole. environment: what the search ran on, as far as it is known; data_dir: where images are looked
    for first. Raises StudyError for a study without a complete trial.
    """
    if not study.ranked(twins=False):
        counts = ", ".join(f"{len(study.of(state))} {state}" for state in ("pruned", "failed", "running"))
        raise StudyError(f"study {study.name!r} has no complete trial to report on: {counts}")
    view = View(study, storage)
    shown = {
        **_head(view),
        **_search(view),
        **_space(view),
        **_curves(view),
        **_errors(view, data_dir),
        **_again(view, environment),
    }
    sections = {name: title for name, title in SECTIONS.items() if name != "factors" or shown["factors"]}
    told = {str(row.number): _told(row) for row in study.trials}
    return page.render("report.html.jinja", told, study=study, sections=sections, **shown)


@dataclass(frozen=True)
class View:
    """A study, and what several sections need of it."""

    study: StudyRow
    storage: BaseStorage

    @cached_property
    def best(self) -> TrialRow:
        """The best trial that was trained itself."""
        return self.study.ranked(twins=False)[0]

    @cached_property
    def chosen(self) -> TrialRow:
        """Whose configuration is shown: the winner's after retraining, before it the best trial's."""
        final = self.study.final
        return next(row for row in self.study.trials if row.number == final["winner"]) if final else self.best

    @cached_property
    def ranked(self) -> list[Rank]:
        """See `findings.ranks`."""
        return findings.ranks(self.study)

    @cached_property
    def importances(self) -> dict[str, float]:
        """See `findings.importances`."""
        return findings.importances(self.study, self.storage)

    @cached_property
    def space(self) -> dict[str, Choice | Range]:
        """The keys that complete trials have at least two values of."""
        values: dict[str, set[Any]] = {}
        for row in self.study.ranked(twins=False):
            for key, value in row.params.items():
                values.setdefault(key, set()).add(value)
        tree = Study(self.study.name, self.study.resolved).tree
        return {key: leaf for key, leaf in leaves(tree) if len(values.get(key, ())) > 1}

    @cached_property
    def names(self) -> dict[str, str]:
        """What the keys of the space are called."""
        return short_names(dict.fromkeys(key for row in self.study.trials for key in row.params))

    def by_importance(self) -> list[str]:
        """The keys of `space`, the most important first, as far as that is known."""
        return sorted(self.space, key=lambda key: -self.importances.get(key, 0.0))


def _head(view: View) -> dict[str, Any]:
    study, final, chosen = view.study, view.study.final, view.chosen
    made: Mapping[str, Any] = final or chosen.result
    pace = final["seconds_per_epoch"] if final else seconds_per_epoch(chosen)
    saved = findings.saved(study)
    facts = [("best in the search", f"{view.best.value:.2%}", f"trial {view.best.number}")]
    if final:
        test = final["test"]
        times = f"on the test part, reading {test['reads']}"
        facts.insert(0, (times, f"{test['accuracy']:.2%}", f"{test['n']:,} images"))
    facts += [
        ("trained to the end", f"{len(study.ranked(twins=False))}", f"of {len(study.trials)} trials"),
        *([("epochs saved", f"{saved.share:.0%}", "by pruning")] if saved.epochs else []),
        ("parameters", f"{made.get('parameters', 0):,}", ""),
        ("MFLOP an image", f"{made.get('flops', 0) / 1e6:,.3g}", "forward"),
        ("an epoch", seconds(pace), "final training" if final else f"trial {chosen.number}"),
    ]
    return {"about": words.about(study), "verdict": words.verdict(study), "facts": facts}


def _search(view: View) -> dict[str, Any]:
    study, ranked, best = view.study, view.ranked, view.ranked[0]
    measured = [
        plots.Measured(f"trial {rank.row.number}", rank.row.value or 0.0, rank.low, rank.high, tied=rank.tied)
        for rank in ranked[:RANKED]
    ]
    return {
        "history": _picture(plots.history(study.trials, best.row.number, (best.low, best.high)), "history"),
        "ranking": _picture(plots.ranking(measured), "ranking"),
        "tie": words.tie(study, ranked),
        "ranked": [_ranked(rank, study) for rank in ranked[:RANKED]],
        "trials_table": [_row(row) for row in sorted(study.trials, key=lambda row: (-(row.value or 0.0), row.number))],
    }


def _space(view: View) -> dict[str, Any]:
    rows, keys = view.study.ranked(twins=False), view.by_importance()
    shares = {view.names[key]: share for key, share in list(view.importances.items())[:KEYS]}
    axes = {key: leaf for key, leaf in view.space.items() if key in keys[:KEYS]}
    sweep = len(view.names) == 1
    return {
        "importance": _picture(plots.importance(shares), "importance") if shares else None,
        "importance_note": words.importance(view.study, bool(shares)),
        "parallel": _picture(plots.parallel(rows, axes, view.names), "parallel") if len(axes) > 1 else None,
        "parallel_note": words.axes(len(axes), len(view.space), bool(shares)),
        "factors": [
            _picture(plots.factor(rows, key, view.space[key], view.names[key], f"f{i}", view.best.number), f"f{i}")
            for i, key in enumerate(keys)
        ],
        "factors_note": words.factors(sweep=sweep),
    }


def _curves(view: View) -> dict[str, Any]:
    study, final = view.study, view.study.final
    epochs = read_epochs(study.folder / "final" / "epochs.csv") if final else ()
    whose = "the final model, trained on all training data" if epochs else f"trial {view.chosen.number}"
    epochs = epochs or view.chosen.epochs
    saved = findings.saved(study)
    return {
        "curves": _picture(plots.curves(epochs), "curves") if epochs else None,
        "curves_whose": whose,
        "progress": _picture(plots.progress(study.trials, study.ranked(twins=False)[:TOP]), "progress"),
        "survival": _picture(plots.survival(study.trials, int(study.resolved["train"]["epochs"])), "survival")
        if saved.epochs
        else None,
        "saved": words.saved(saved),
    }


def _errors(view: View, data_dir: Path | None) -> dict[str, Any]:
    """The final model's answers on the test part, once there are any; the images shown are always of the validation
    part: whoever looks at test images and then turns a knob has tuned on them.
    """
    study, names = view.study, [str(name) for name in view.study.data["classes"]]
    held = findings.predictions(view.chosen.folder)
    tested = findings.predictions(study.folder / "final") if study.final else None
    answers = tested or held
    pairs, note = _pairs(study, view.chosen.number, held, names, data_dir) if held else ([], "")
    return {
        "errors_whose": words.whose(view.chosen.number, tested is not None, answers is not None),
        "confusion": _picture(plots.confusion(answers.labels, answers.chosen, names), "confusion") if answers else None,
        "classes": [
            {"name": name, "precision": f"{one.precision:.1%}", "recall": f"{one.recall:.1%}", "n": f"{one.n:,}"}
            for name, one in zip(names, findings.per_class(answers), strict=True)
        ]
        if answers
        else [],
        "pairs": pairs,
        "pairs_note": note,
    }


def _pairs(
    study: StudyRow, trial: int, held: Predictions, names: list[str], data_dir: Path | None
) -> tuple[list[dict[str, Any]], str]:
    """The most confused pairs with their images, and a word on them; without images where those cannot be had."""
    pairs = findings.confused(held)
    places = [place for pair in pairs for place in pair.examples]
    note = (
        f"By trial {trial} on the validation part: how often, which share of the true class, and the surest mistakes. "
        "No test image is ever shown."
    )
    sources: dict[int, str] = {}
    try:
        config = DataConfig.from_table(study.resolved["data"])
        wanted = held.indices[places].tolist()
        shown = training_images(config, wanted, study.data["fingerprint"], data_dir) if places else ()
        sources = {place: page.data_uri(image) for place, image in zip(places, shown, strict=True)}
    except DataError as error:
        note = f"Their images cannot be shown here: {error}"
    return [
        {
            "true": names[pair.true],
            "predicted": names[pair.predicted],
            "count": pair.count,
            "share": f"{pair.share:.1%}",
            "images": [
                {
                    "source": sources[place],
                    "index": int(held.indices[place]),
                    "sure": f"{held.probabilities[place, pair.predicted]:.0%}",
                }
                for place in pair.examples
                if place in sources
            ],
        }
        for pair in pairs
    ], note


def _again(view: View, environment: Mapping[str, str]) -> dict[str, Any]:
    study, chosen = view.study, view.chosen
    file = chosen.folder / "config.toml"
    resolved = dict(study.resolved)
    known = {
        **environment,
        "device": str(chosen.result.get("device", "")),
        **{name: str(text) for name, text in chosen.result.get("versions", {}).items()},
        "data fingerprint": str(study.data["fingerprint"]),
        "study digest": study.digest,
        "seeds": f"search {resolved['search']['seed']}, data {resolved['data']['seed']}, "
        f"trial {chosen.config.get('train', {}).get('seed', '')}",
    }
    return {
        "name": study.name,
        "chosen": chosen.number,
        "config": file.read_text("utf-8") if file.is_file() else tomli_w.dumps(dict(chosen.config)),
        "resolved": tomli_w.dumps({"name": study.name, **resolved}),
        "environment": {name: text for name, text in known.items() if text},
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def _picture(drawn: Any, name: str) -> Markup:
    return page.drawn(plots.svg(drawn, name))


def _ranked(rank: Rank, study: StudyRow) -> dict[str, Any]:
    row = rank.row
    won = study.final is not None and study.final["winner"] == row.number
    return {
        "trial": row.number,
        "mark": "retrained" if won else "",
        "style": "best" if rank.p is None and not rank.difference else "" if rank.tied else "differs",
        "accuracy": f"{row.value:.2%}",
        "difference": f"{100 * rank.difference:+.2f}" if rank.difference else "",
        "p": "" if rank.p is None else findings.p_value(rank.p),
        "seconds": f"{seconds_per_epoch(row):.2f}" if row.epochs else "",
        "parameters": f"{row.result['parameters']:,}" if "parameters" in row.result else "",
    }


def _row(row: TrialRow) -> dict[str, Any]:
    state = row.state + (f" (twin of {row.twin})" if row.twin is not None else "")
    last = row.value if row.value is not None else next(reversed([*row.reported.values()]), None)
    return {
        "trial": row.number,
        "state": state,
        "accuracy": "" if last is None else f"{last:.2%}",
        "epochs": len(row.epochs),
        "seconds": f"{seconds_per_epoch(row):.2f}" if row.epochs else "",
        "params": row.reason if row.state == "failed" and row.reason else show_params(row.params),
    }


def _told(row: TrialRow) -> str:
    value = "" if row.value is None else f" {row.value:.2%}"
    chosen = [f"{name} = {figure(row.params[key])}" for key, name in short_names(row.params).items()]
    return "\n".join([f"trial {row.number}: {row.state}{value}", *chosen])
