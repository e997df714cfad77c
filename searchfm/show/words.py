"""What a report says in sentences: each number with its interval, and what that is an interval of."""

from collections.abc import Sequence

from searchfm.search.history import StudyRow
from searchfm.show import findings
from searchfm.show.findings import Rank, Saved
from searchfm.show.terminal import seconds, spent
from searchfm.stats import wilson


def about(study: StudyRow) -> str:
    """Which data, and how far the search is."""
    data, asked = study.data, study.resolved["data"]
    states = ", ".join(
        f"{len(study.of(state))} {state}" for state in ("complete", "pruned", "failed", "running") if study.of(state)
    )
    return (
        f"{asked['name']}: {data['train']:,} images to train on, {data['validation']:,} to validate, "
        f"{len(data['classes'])} classes. {len(study.trials)} of {study.planned} trials: {states}; "
        f"{seconds(study.seconds)} from the first to the last."
    )


def verdict(study: StudyRow) -> list[str]:
    """The result, the main sentence first."""
    return _searched(study) if study.final is None else _retrained(study)


def _searched(study: StudyRow) -> list[str]:
    complete, n = study.ranked(twins=False), int(study.data["validation"])
    best = complete[0]
    assert best.value is not None
    low, high = wilson(round(best.value * n), n)
    told = [
        f"Trial {best.number} gets {best.value:.2%} of {n:,} validation images right "
        f"(95% interval {low:.2%} to {high:.2%}, for this one model on images like these)."
    ]
    if len(complete) > 1:
        told.append(
            f"It was chosen as the best of {len(complete)} complete trials on these same images, which flatters it: "
            "expect less of a fresh training."
        )
    return told


def _retrained(study: StudyRow) -> list[str]:
    final = study.final
    assert final is not None
    test, checked, winner = final["test"], final["validation"], final["winner"]
    times = "once" if test["reads"] == 1 else f"{test['reads']} times"
    told = [
        f"The final model gets {test['accuracy']:.2%} of {test['n']:,} test images right "
        f"(95% interval {test['low']:.2%} to {test['high']:.2%}, for this one model on images like these).",
        f"It has the configuration of trial {winner}, trained on all training data for {final['epochs']} epochs. With "
        f"it, the test part of these data was read {times} by the studies of this home.",
    ]
    if checked["low"] is not None and final["optimism"] is not None:
        said = checked["accuracy"] + final["optimism"]
        told.append(
            f"On the search's own data and epochs, trainings with fresh seeds give {checked['accuracy']:.2%} of the "
            f"validation images on average (95% interval {checked['low']:.2%} to {checked['high']:.2%}, for one more "
            f"seed). The search had said {said:.2%}, {abs(100 * final['optimism']):.2f} points too "
            f"{'much' if final['optimism'] >= 0 else 'little'}."
        )
    if final["tie"]:
        names = ", ".join(str(number) for number in final["tie"])
        told.append(f"Trials {names} could not be told apart with fresh seeds; trial {winner} is the cheapest of them.")
    return told


def tie(study: StudyRow, ranked: Sequence[Rank]) -> str:
    """The noise floor of the search."""
    n, tied = int(study.data["validation"]), [rank for rank in ranked if rank.tied]
    if len(ranked) == 1:
        return "Only one trial is complete: there is nothing to tell it from."
    if len(tied) == 1:
        return f"The best trial stands alone: {n:,} validation images tell every other one from it."
    together = all(rank.tied for rank in ranked[: len(tied)])
    who = f"The top {len(tied)} are a tie" if together else f"{len(tied)} trials are a tie, the best among them"
    floor = 100 * -min(rank.difference for rank in tied)
    text = f"{who}: {n:,} validation images cannot tell them apart, though they differ by up to {floor:.2f} points."
    cheap = findings.cheapest(ranked)
    return (
        text if cheap is None else f"{text} Of these, trial {cheap.number} trained fastest ({seconds(spent(cheap))})."
    )


def saved(found: Saved) -> str:
    """What pruning saved."""
    if not found.epochs:
        return "No trial was pruned."
    return (
        f"Pruning saved {found.epochs:,} of {found.full:,} epochs ({found.share:.0%}), about {seconds(found.seconds)} "
        "of training."
    )


def importance(study: StudyRow, known: bool) -> str:
    """What importance rests on, or why there is none."""
    count = len(study.ranked(twins=False))
    if known:
        sure = "" if count >= 10 * findings.ENOUGH else "; with so few it is a hint, not a finding"
        return f"Importance by PED-ANOVA (arXiv 2304.10255) on {count} complete trials{sure}. Pruned ones are left out."
    if count < findings.ENOUGH:
        return f"Importance needs at least {findings.ENOUGH} complete trials; this study has {count}."
    return "All complete trials have one accuracy: no key is more important than another."


def axes(shown: int, keys: int, known: bool) -> str:
    """Which keys the parallel coordinates leave out."""
    if shown == keys:
        return ""
    return f"Shown are {'the' if known else 'the first'} {shown}{' most important' if known else ''} of {keys} keys."


def factors(*, sweep: bool) -> str:
    """How the pictures of single keys are to be read."""
    how = "A dot is a complete trial, red the best; a bar is the median of a value's trials."
    if sweep:
        return f"{how} Nothing else was searched, so what differs is this key and the seed."
    return f"{how} The other keys differ from dot to dot too, so this shows what went together, not what caused it."


def whose(trial: int, tested: bool, known: bool) -> str:
    """Whose answers the confusion matrix counts."""
    if not known:
        return f"The predictions of trial {trial} are no longer in its folder."
    if tested:
        return "Answers of the final model on the test part, as they were when it was read."
    return f"Answers of trial {trial} on the validation part."
