"""What MLflow lacks of a study, and putting it right: `searchfm sync`. Hold the study's lock while applying."""

from collections.abc import Sequence

from searchfm.home import Home
from searchfm.search.history import StudyRow
from searchfm.search.notes import Links, Notes
from searchfm.tracking.client import connect, reaching
from searchfm.tracking.mirror import Difference, Mirror


def differences(home: Home, study: StudyRow) -> list[Difference]:
    """Everything in which MLflow differs from the study's record; writes nothing. Raises StorageError."""
    mirror = Mirror(home, study)
    with reaching(home):
        if not mirror.find():
            return [
                Difference(None, "missing", "has no experiment"),
                *(Difference(row.number, "missing", "has no run") for row in study.trials),
            ]
        found = mirror.compare_study()
        for row in study.trials:
            found += mirror.compare(row, deep=True)
        return found + mirror.compare_weights(study.kept)


def apply(home: Home, study: StudyRow, found: Sequence[Difference]) -> None:
    """Brings MLflow in line in everything that was found, and the dashboard's notes with it. Raises StorageError."""
    mirror, notes = Mirror(home, study), Notes(home, study)
    rows = {row.number: row for row in study.trials}
    numbers = sorted({difference.trial for difference in found if difference.trial is not None})
    with reaching(home):
        mirror.open()
        for number in numbers:
            mirror.align(rows[number])
        # What is still different cannot be corrected, only made anew: params and metrics never change in MLflow.
        mirror.forget()
        mirror.open()
        for number in numbers:
            if any(rest.kind in ("params", "metrics") for rest in mirror.compare(rows[number], deep=True)):
                mirror.replace(number)
                mirror.align(rows[number])
        if any(difference.trial is None for difference in mirror.compare_study()):
            mirror.align_study(study, "RUNNING" if study.of("running") else "FINISHED")
        mirror.keep(study.kept)
    for row in study.trials:
        if row.state != "running" and (row.number in numbers or not notes.has(row)):
            notes.trial(row, mirror.links())
    notes.study(study, mirror.links())


def run_links(home: Home, study: StudyRow) -> Links:
    """The ids that links into MLflow's pages are made of. Raises StorageError."""
    mirror = Mirror(home, study)
    with reaching(home):
        mirror.find()
    return mirror.links()


def make_schema(home: Home) -> None:
    """Makes MLflow's database where it is a file that is not there yet. Raises StorageError."""
    with reaching(home):
        connect(home)
