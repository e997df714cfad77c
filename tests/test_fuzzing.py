"""Generated study files, overrides, command lines, records and messages: each works, or is refused in one line."""

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from searchfm import cli, records
from searchfm.config import Config, SearchConfig
from searchfm.engines import EngineOptions, wire
from searchfm.engines.start import read_options
from searchfm.errors import StorageError, UserError
from searchfm.forkserver import without_secrets
from searchfm.home import shipped, shipped_folder
from searchfm.jobs import EpochDone, Failed, Finished, Interrupted, Job, Lost
from searchfm.records import Record
from searchfm.search import files, first
from searchfm.stopping import read_duration
from searchfm.tables import walk
from tests import rows
from tests.commands import Done, searchfm_here
from tests.fuzzing import Property, bounded, check_line, fuzz, listing, properties, refused

LEAVES = {dotted: item for dotted, _, item in [*walk(SearchConfig, "search."), *walk(Config)]}
KEYS = sorted(LEAVES)
ENGINE = {dotted: item for dotted, _, item in walk(EngineOptions)}
STUDIES = [(shipped_folder() / f"{name}.toml").read_text("utf-8") for name in shipped()]
WORDS = ["tpe", "grid", "gp", "cmaes", "qmc", "hyperband", "promote", "none", "vit", "cnn", "custom", "transfer", "all"]

# --- TOML -------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    "nan",
    "-inf",
    "-0.0",
    "1e400",
    "1e308",
    "5e-324",
    "-1",
    "0",
    "9223372036854775807",
    "9" * 5000,
    "0x" + "f" * 5000,
    "true",
    '""',
    '"\\u0000"',
    '"a\\nb\\u001b[31m\\u2028"',
    '"' + "x" * 5000 + '"',
    "'~nobody/../..'",
    '"😀"',
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "[]",
    "[[]]",
    "{}",
    "[" * 3000 + "]" * 3000,
    "[" * 60 + "]" * 60,
    "{ choice = [] }",
    "{ choice = [1, 1.0, true, 'a'] }",
    "{ choice = [{ low = 1, high = 2 }] }",
    "{ low = 1 }",
    "{ low = 1e-300, high = 1e300, step = 1e-300 }",
    "{ low = 1, high = 9223372036854775807 }",
    "{ low = 0.1, high = 0.3, step = 0.1 }",
    "{ low = 0, high = 1, log = true }",
    "{ low = -1e308, high = 1e308 }",
    "{ low = nan, high = nan }",
    "{ low = 1, high = 3, step = 0 }",
    "{ low = 1, high = 3, log = 7, step = 'a' }",
]


def quoted(text: str) -> str:
    """A TOML string. JSON's escapes are TOML's, but for characters beyond 16 bits."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


scalars = st.one_of(
    st.sampled_from(HOSTILE),
    st.sampled_from(WORDS).map(quoted),
    st.integers(-3, 300).map(str),
    st.floats().map(repr),
    st.text(max_size=12).map(quoted),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    st.lists(scalars, min_size=1, max_size=3).map(lambda items: f"{{ choice = [{', '.join(items)}] }}"),
    st.tuples(scalars, scalars, scalars).map(lambda ends: "{{ low = {}, high = {}, step = {} }}".format(*ends)),
    st.tuples(scalars, scalars).map(lambda ends: "{{ low = {}, high = {}, log = true }}".format(*ends)),
)


def fitting(dotted: str) -> st.SearchStrategy[str]:
    """Values that a key takes by its type and bounds, and ranges of them; other keys may forbid them."""
    item = LEAVES.get(dotted) or ENGINE.get(dotted)
    if item is None:
        return values
    numbers = [item.bounds.get("ge", item.bounds.get("gt", 0)), item.bounds.get("le", item.bounds.get("lt", 300))]
    low, high = min(numbers), max(numbers)
    kinds: list[st.SearchStrategy[str]] = [st.sampled_from(item.texts).map(quoted)] if item.texts else []
    if bool in item.types:
        kinds.append(st.sampled_from(["true", "false"]))
    if int in item.types:
        kinds.append(st.integers(int(low), int(high)).map(str))
    if float in item.types:
        kinds.append(st.floats(low, high).map(repr))
    if str in item.types:
        kinds.append(st.text(max_size=6).map(quoted))
    one = st.one_of(kinds)
    return st.one_of(
        one,
        one,
        st.lists(one, min_size=1, max_size=3).map(lambda items: f"{{ choice = [{', '.join(items)}] }}"),
        st.tuples(one, one).map(lambda ends: "{{ low = {}, high = {} }}".format(*sorted(ends, key=_number))),
        st.lists(one, min_size=1, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


@st.composite
def assignments(draw: Callable[..., Any]) -> tuple[str, str]:
    """A key with a value that its type allows."""
    key = draw(st.sampled_from(KEYS))
    return key, draw(fitting(key))


keys = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from(KEYS),
    st.sampled_from(KEYS).map(lambda key: key.rpartition(".")[0]),
    st.sampled_from(KEYS).map(lambda key: f"first.{key}"),
    st.sampled_from(
        ["name", "first", "search", "model", '""', '"a\\nb"', "x" * 5000, "a." * 3000 + "a", "a." * 40 + "a"]
    ),
    st.text(min_size=1, max_size=8).map(quoted),
)
pairs = st.tuples(keys, values).map(" = ".join)
headers = st.sampled_from(KEYS).map(lambda key: f"[{key.rpartition('.')[0]}]")
lines = st.one_of(pairs, pairs, pairs, headers, st.just("[[first]]"), st.text(max_size=20))


@st.composite
def mutated(draw: Callable[..., Any]) -> str:
    """A built-in study with some lines replaced, doubled, removed or added, and some values replaced."""
    text = [line for line in draw(st.sampled_from(STUDIES)).splitlines() if line and not line.startswith("#")]
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        index = draw(st.integers(0, max(len(text) - 1, 0)))
        match draw(st.sampled_from(["fit", "fit", "fit", "fit", "value", "value", "line", "double", "remove", "add"])):
            case "fit" | "value" as kind if "=" in text[index]:
                table = next((line.strip("[]") for line in text[index::-1] if line.startswith("[")), "")
                key = text[index].partition("=")[0].strip()
                text[index] = f"{key} = {draw(fitting(f'{table}.{key}') if kind == 'fit' else values)}"
            case "double":
                text.insert(index, text[index])
            case "remove" if len(text) > 1:
                del text[index]
            case "add":
                text.insert(index, draw(lines))
            case _:
                text[index] = draw(lines)
    return "\n".join(text)


@st.composite
def toml(draw: Callable[..., Any]) -> bytes:
    """The bytes of a study file: mutated, generated, or anything at all."""
    text = draw(
        st.one_of(
            mutated(), mutated(), mutated(), mutated(), st.lists(pairs, max_size=4).map("\n".join), st.text(max_size=40)
        )
    )
    data: bytes = text.encode("utf-8", "surrogatepass")
    match draw(st.sampled_from([*[""] * 15, "crlf", "bom", "utf-16", "bytes", "cut"])):
        case "crlf":
            return data.replace(b"\n", b"\r\n")
        case "bom":
            return b"\xef\xbb\xbf" + data
        case "utf-16":
            return data.decode("utf-8", "replace").encode("utf-16")
        case "bytes":
            return draw(st.binary(max_size=20)) + data
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
    return data


@contextlib.contextmanager
def unwritten() -> Iterator[Path]:
    """An empty current folder, in which nothing is written."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        yield folder
        assert not listing(folder)


def at_file(content: bytes) -> Path:
    path = Path(tempfile.gettempdir()) / f"fuzzed-{os.getpid()}.toml"
    path.write_bytes(content)
    return path


ACCEPTED: Counter[str] = Counter()  # examples that were not refused, by property


FOUND = [
    b"a = " + b"9" * 5000,  # ValueError of `int`
    b"search.trials = 0x" + b"f" * 5000,  # the same, once the error showed it
    b"augment.crop = " + "'\x85'".encode(),  # a line end in a message
    b'"a\\nb" = 1',
    b"a." * 3000 + b"a = 1",  # RecursionError: dotted keys, which the parser reads without recursion
    b"optimizer.lr = { low = 1e-300, high = 1e300, step = 1e-300 }",  # decimal.InvalidOperation
    b"augment.crop = '" + b"x" * 5000 + b"'",  # a message as long as the value
]


@fuzz(100, content=toml(), found=[{"content": content} for content in FOUND])
def study_files(content: bytes) -> None:
    path = at_file(content)
    with unwritten(), refused(UserError):
        study = files.read(path).study()
        for config in study.samples(1):
            assert Config.from_table(config.to_table()) == config
        ACCEPTED["study_files"] += 1


override_texts = st.one_of(
    assignments().map("=".join),
    assignments().map("=".join),
    st.tuples(keys, values).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.text(max_size=20)).map("=".join),
    st.tuples(st.sampled_from(KEYS), st.sampled_from(["1", "²", "9" * 5000, "0", "-1"]), values).map(
        lambda parts: f"{parts[0]}.{parts[1]}={parts[2]}"
    ),
    st.text(max_size=20),
)


@fuzz(
    60,
    texts=st.lists(override_texts, min_size=1, max_size=2),
    name=st.sampled_from(["mlp", "cnn", "vit"]),
    found=[
        {"texts": ["first.²=1"], "name": "mlp"},  # ValueError of `int`, for which `isdigit` was asked
        {"texts": ["a." * 3000 + "a=1"], "name": "mlp"},  # RecursionError
        {"texts": ["augment.crop=" + "[" * 3000], "name": "mlp"},  # RecursionError
    ],
)
def overrides(texts: list[str], name: str) -> None:
    with unwritten(), refused(UserError):
        study = files.read(shipped_folder() / f"{name}.toml").study(files.overrides({}, texts))
        study.samples(1)
        ACCEPTED["overrides"] += 1


def config_file(pairs: list[tuple[str, str]]) -> bytes:
    return "\n".join(f"{key} = {value}" for key, value in pairs).encode("utf-8", "replace")


SPACE = files.read(shipped_folder() / "mlp.toml").study().tree


@fuzz(100, content=st.one_of(toml(), st.lists(assignments(), max_size=3).map(config_file)))
def first_files(content: bytes) -> None:
    path = at_file(content)
    with unwritten(), refused(UserError):
        for table in files.read_first(path):
            known = first.read(SPACE, table)
            assert first.read(SPACE, known.to_table()) == known
        ACCEPTED["first_files"] += 1


engine_keys = st.sampled_from(sorted(ENGINE))
engine_fits = engine_keys.flatmap(lambda key: st.tuples(st.just(key), fitting(key))).map(" = ".join)
engine_pairs = st.one_of(engine_fits, engine_fits, st.tuples(st.one_of(engine_keys, keys), values).map(" = ".join))


@fuzz(
    100,
    content=st.one_of(
        st.lists(engine_pairs, max_size=2).map(
            lambda lines: "\n".join(["[engine]", *lines]).encode("utf-8", "replace")
        ),
        st.tuples(engine_keys, values).map(lambda pair: f"engine.{pair[0]} = {pair[1]}".encode("utf-8", "replace")),
        toml(),
    ),
    flags=st.just({})
    | st.dictionaries(
        st.one_of(engine_keys, st.just("slurm.args")), st.sampled_from([3, "x", ("a",), -1.5, True]), max_size=3
    ),
    found=[
        {"content": b'[engine]\nname = "slurm"\nslurm = 3', "flags": {"slurm.gres": "gpu:1"}},  # AttributeError
        {"content": b"engine = " + b"[" * 3000, "flags": {}},  # RecursionError
    ],
)
def engine_files(content: bytes, flags: dict[str, Any]) -> None:
    path = at_file(content)
    with unwritten(), refused(UserError):
        read_options(str(path), flags)
        ACCEPTED["engine_files"] += 1


@fuzz(
    100,
    text=st.one_of(st.text(max_size=20), st.from_regex(r"-?\d*\.?\d*[smhd]?\d*[smh]?", fullmatch=True), st.floats()),
)
def durations(text: str | float) -> None:
    with refused(UserError):
        assert read_duration(text) >= 0


@fuzz(
    100,
    text=st.one_of(st.text(max_size=20), st.text("[]:0123456789²", max_size=12)),
    found=[{"text": "h:" + "9" * 5000}],  # ValueError of `int`
)
def addresses(text: str) -> None:
    with refused(UserError):
        _, port = wire.address(text, "--listen")
        assert 0 <= port <= 65535


# --- records ----------------------------------------------------------------------------------------------------------

ATOMS: list[Any] = [None, True, -1, 0, 10**30, -(10**400), 1.5, float("nan"), float("inf"), "", "a\nb", "x" * 5000]
plain = st.recursive(
    st.one_of(st.sampled_from(ATOMS), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def changed(draw: Callable[..., Any], value: Any) -> Any:
    """A plain value with an entry at some depth removed, added or of another type."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(["inside", "inside", "remove", "add"])):
            case "remove":
                return {name: item for name, item in value.items() if name != key}
            case "add":
                return {
                    **value,
                    draw(st.sampled_from(["format", "right", "class", "per_class", "result", key])): draw(plain),
                }
        return {**value, key: draw(changed(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(changed(value[index])), *value[index + 1 :]]
    return draw(plain)


EPOCH = rows.epochs(0, 1)[0]
FIGURES = records.ClassFigures("cat", 0.5, 0.5, 2)
FINALIST = records.FinalistFigures(0, 0.5, (0.5,), 0.5, 1.0, (1,), 1, 1)
VALIDATION = records.Validation(0.5, 0.4, 0.6, 0.1, 10)
TESTED = records.TestFigures(0.5, 0.4, 0.6, 10, 1, "f")
RESULT = records.TestResult(0.5, 1.0, 5, 10, (FIGURES,), "f", 1.0, {"a": "b"})
PREPARED = rows.header().data
FINAL = rows.final(
    (0.5, 2),
    finalists=(FINALIST,),
    optimism=0.1,
    validation=VALIDATION,
    test=TESTED,
    per_class=(FIGURES,),
    model=records.RegisteredModel("searchfm-toy", 1, "models:/searchfm-toy/1", True),
    seconds=1.0,
    params={"optimizer.lr": 0.1},
    weights="w",
)
RECORDS: list[Record] = [
    EPOCH,
    FIGURES,
    FINALIST,
    VALIDATION,
    TESTED,
    RESULT,
    PREPARED,
    FINAL,
    FINAL.plan,
    FINAL.model or FINAL,
    rows.header(),
    records.Forecast(1, 1, 1.0, 1.0, 1.0, 1, 1, 1),
    records.TrainResult(0.5, files={"a": "b"}),
    records.PrepareJob({"name": "mnist"}, (("resnet18", "hub"),), None),
    records.PrepareResult(PREPARED, {"cuda": 1}),
    records.ForecastJob(({"a": 1},), None, 1.0),
    records.ForecastResult((records.Timing(1, 1.0, 1, 1.0, None),), 1),
    records.TrainJob({"a": 1}, "i", None, "f", 1.0),
    records.TestJob("m", {"a": "b"}, None),
    records.ExportJob("m", {"a": "b"}),
    records.ExportResult("2.13", {"a": "b"}),
    records.JobRecord("i", json.loads(json.dumps(RESULT.to_json()))),
    records.TestRead("toy", 0, "m", 1.0),
    records.TestReads({"f": (records.TestRead("toy", 0, "m", 1.0),)}),
]


def plain_values(record: Record) -> Any:
    return json.loads(json.dumps(record.to_json()))


def test_every_record_is_fuzzed() -> None:
    def below(cls: type) -> Iterator[type]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    made = {type(record) for record in RECORDS} | {records.Timing}
    assert {cls for cls in below(Record) if cls.__module__ == records.__name__} - made == {
        records.StudyRecord
    }  # a view of others
    for record in RECORDS:
        assert type(record).from_json(plain_values(record)) == record


@st.composite
def record_values(draw: Callable[..., Any]) -> tuple[int, Any]:
    number = draw(st.integers(0, len(RECORDS) - 1))
    before = plain_values(RECORDS[number])
    if draw(st.booleans()):
        before.pop("format", None)  # the oldest
    return number, draw(changed(before))


@fuzz(
    200,
    item=record_values(),
    found=[
        {"item": (0, None)},  # TypeError
        {"item": (RECORDS.index(FINAL), {"format": 1, "per_class": [1]})},  # AttributeError of an upgrade
        {"item": (next(i for i, each in enumerate(RECORDS) if type(each) is records.JobRecord), {})},  # KeyError
    ],
)
def kept_records(item: tuple[int, Any]) -> None:
    number, values = item
    kind = type(RECORDS[number])
    with refused(StorageError):
        kind.from_json(values, "where")


# --- messages ---------------------------------------------------------------------------------------------------------

VERSIONS = wire.Versions("3.11", "2.13", "0.4")
MESSAGES: list[Any] = [
    wire.Challenge(1, "n"),
    wire.Answer("n", "p"),
    wire.Welcome("p", VERSIONS, "file", "content"),
    wire.Joined("h", ("cpu",), "file"),
    wire.Refused("h", "r"),
    wire.Stop("1"),
    wire.Leave("r"),
    wire.Leaving(),
    wire.Alive(),
    Job("1", Path("a/b"), "searchfm.learn.entries:test", {"model": "a"}),
    EpochDone("1", 1, EPOCH),
    Finished("1", 1, {"a": 1}),
    Failed("1", 1, "k", "r"),
    Interrupted("1", 1),
    Lost("1", 1, "r"),
]


@st.composite
def frames(draw: Callable[..., Any]) -> bytes:
    message = json.loads(wire.encode(draw(st.sampled_from(MESSAGES))))
    data: bytes = json.dumps(draw(changed(message))).encode()
    match draw(st.sampled_from(["", "", "", "cut", "bytes"])):
        case "cut":
            return data[: draw(st.integers(0, len(data)))]
        case "bytes":
            index = draw(st.integers(0, len(data)))
            return data[:index] + draw(st.binary(min_size=1, max_size=4)) + data[index:]
    return data


def test_every_message_is_fuzzed() -> None:
    assert {type(message) for message in MESSAGES} == set(wire.KINDS.values())
    for message in MESSAGES:
        assert wire.decode(wire.encode(message)) == message


DEEP = b'["Finished",{"job":"1","attempt":1,"result":{"a":' + b"[" * 3000 + b"]" * 3000 + b"}}]"


@fuzz(
    200,
    data=st.one_of(frames(), frames(), frames(), st.binary(max_size=60)),
    found=[{"data": DEEP}],  # RecursionError
)
def messages(data: bytes) -> None:
    with refused(wire.WireError):
        message = wire.decode(data)
        assert type(message) in wire.KINDS.values()
        if isinstance(message, Job):
            with unwritten() as home:
                wire.local(message, home, None, wire.ENTRIES)


def test_a_link_to_itself_is_no_folder_of_a_job(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(wire.WireError, match="outside the home"):
        wire.local(Job("1", Path("loop/a"), "searchfm.learn.entries:trial", {}), tmp_path, None, wire.ENTRIES)


class Peer:
    """The other end of a connection: what it sends is given. It stands in for the socket alone."""

    def __init__(self, frames: list[bytes]) -> None:
        self.frames = frames

    def recv(self, timeout: float) -> bytes:
        if not self.frames:
            raise TimeoutError
        return self.frames.pop(0)

    def send(self, data: bytes, *, text: bool) -> None:
        assert text


answers = st.one_of(
    frames(),
    st.builds(wire.Answer, st.text(max_size=5), st.text(max_size=5)).map(wire.encode),
    st.builds(wire.Challenge, st.integers(0, 2), st.text(max_size=5)).map(wire.encode),
    st.builds(wire.Welcome, st.text(max_size=5), st.just(VERSIONS), st.text(max_size=5), st.text()).map(wire.encode),
    st.sampled_from(MESSAGES).map(wire.encode),
)


@fuzz(
    100,
    sent=st.lists(answers, max_size=3),
    node=st.booleans(),
    found=[
        {"sent": [wire.encode(wire.Answer("", "é"))], "node": False},  # TypeError of `hmac.compare_digest`
        {"sent": [wire.encode(wire.Challenge(wire.PROTOCOL, "")), wire.encode(wire.Leave())], "node": True},  # no text
    ],
)
def handshakes(sent: list[bytes], node: bool) -> None:
    """No peer without the key gets through, whatever it sends in whatever order."""
    link, key = wire.Link(Peer(sent)), b"k" * 32  # type: ignore[arg-type]
    with refused(wire.WireError, UserError):
        (wire.introduce(link, key) if node else wire.welcome(link, key, VERSIONS, "file", "content"))
        raise AssertionError("a peer without the key was let in")


# --- command lines ----------------------------------------------------------------------------------------------------


def app_commands() -> dict[str, Any]:
    from typer.main import get_command

    command: Any = get_command(cli.app)
    return dict(command.commands)


COMMANDS = app_commands()
BAD = [
    "no-such",
    "",
    "-",
    "--",
    "--no-such",
    "../../x",
    "a\nb",
    "\udce9",
    "\x1b[31m",
    "x" * 3000,
    "😀",
    "nan",
    "-1",
    "1e400",
]
BAD += ["9" * 5000, "0x10", "a=b", "=", "[[", "²", "~nobody/x"]


@st.composite
def command_lines(draw: Callable[..., Any]) -> list[str]:
    """A command with options from its own list; a study, model or address is always one that there is not."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    words: list[str] = []
    for param in COMMANDS[name].params:
        if param.param_type_name == "argument":
            words += [draw(st.sampled_from(BAD))] * bool(draw(st.integers(0, 5)) or name == "dashboard")
        elif param.opts[-1] not in ("--home", "--yes", "--watch") and not draw(st.integers(0, 7)):
            words += [draw(st.sampled_from(param.opts))]
            words += [] if param.is_flag else [draw(st.sampled_from(BAD))]
    return [name, *draw(st.permutations(words))] if draw(st.booleans()) else [name, *words]


def end(*words: str) -> Done:
    """How a command ends, which makes no home. With a variable that may hold a password, which other commands of this
    process may have set, `worker` would replace the process.
    """
    with unwritten() as folder, bounded(60), pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - without_secrets(os.environ).keys():
            patch.delenv(name)
        done = searchfm_here(*words, SEARCHFM_HOME=str(folder / "home"))
    assert done.returncode in (0, 1, 2), done
    if done.returncode:
        line = done.stderr.removesuffix("\n")
        assert line.startswith("searchfm: "), line
        check_line(line.removeprefix("searchfm: "))
    return done


@fuzz(10, words=command_lines())
def parsing(words: list[str]) -> None:
    """An option that there is not, at the end: nothing is imported or done."""
    assert end(*words, "--no-such-option").returncode in (1, 2) or "--help" in words or "--" in words


@fuzz(10, words=command_lines(), found=[{"words": [name, "9" * 5000]} for name in ("backup", "clean", "export")])
def commands(words: list[str]) -> None:
    end(*words)


PROPERTIES = properties(globals())
LEAST = {"study_files": 0.05, "overrides": 0.02, "first_files": 0.05, "engine_files": 0.02}  # fractions not refused


@pytest.mark.parametrize("name", [name for name, each in PROPERTIES.items() if each.found])
def test_what_failed_once(name: str) -> None:
    PROPERTIES[name].run(0)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", PROPERTIES)
def test_generated(name: str) -> None:
    before = ACCEPTED[name]
    PROPERTIES[name].run(1)
    if name in LEAST:
        assert ACCEPTED[name] - before >= LEAST[name] * PROPERTIES[name].count


@pytest.mark.nightly
@pytest.mark.parametrize("name", PROPERTIES)
def test_generated_new(name: str, record_property: Callable[[str, object], None], pytestconfig: pytest.Config) -> None:
    each: Property = PROPERTIES[name]
    number = each.run_new(100, pytestconfig.getoption("--hypothesis-seed"))
    record_property("figures", f"{name}: {100 * each.count:,} examples, seed {number}")
