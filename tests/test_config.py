"""A configuration is read exactly as its dataclasses say, or refused with place and value."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.config import Plausible, load_config, parse_config, plain_config, save_config
from moe_runtime.errors import ConfigError

REMEDY = "mend it"
Speed = Annotated[float, Plausible(0.1, 200, "m/s")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    radius_mm: Annotated[int, Plausible(1, 1000, "mm")]
    colour: Literal["red", "blue"] = "red"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cart:
    name: str
    speed: Speed
    is_new: bool
    built_on: date | None = None
    speeds: tuple[Speed, Speed] | None = None
    tags: tuple[str, ...] = ()
    wheels: tuple[Wheel, ...]
    spare: Wheel | None = None

    def __post_init__(self) -> None:
        if self.speeds is not None and self.speeds[0] > self.speeds[1]:
            raise ValueError(f"speeds fall from {self.speeds[0]} to {self.speeds[1]}")


SOUND = """
name: barrow
speed: 3
is_new: false
built_on: 2026-01-31
speeds: [1.5, 4]
tags: [old, slow]
wheels:
- {radius_mm: 200, colour: blue}
- radius_mm: 201
"""


def read(tmp_path: Path, text: str) -> Cart:
    path = tmp_path / "cart.yaml"
    path.write_text(text)
    return load_config(Cart, path, remedy=REMEDY)


def refusal(tmp_path: Path, text: str) -> str:
    """What is said of a file, without the path it begins with and the remedy it ends with."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path / "cart.yaml"))
    assert sentence.endswith(f"; {REMEDY}")
    assert "\n" not in sentence
    return sentence.removeprefix(str(tmp_path / "cart.yaml")).removesuffix(f"; {REMEDY}")


def test_a_sound_file_becomes_the_dataclasses_with_their_defaults(tmp_path: Path) -> None:
    cart = read(tmp_path, SOUND)
    assert cart == Cart(
        name="barrow",
        speed=3.0,
        is_new=False,
        built_on=date(2026, 1, 31),
        speeds=(1.5, 4.0),
        tags=("old", "slow"),
        wheels=(Wheel(radius_mm=200, colour="blue"), Wheel(radius_mm=201)),
    )
    assert type(cart.speed) is float


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("speed: 3", "sped: 3", ": unknown key sped, the nearest is speed"),
        ("radius_mm: 201", "radius: 1", ": unknown key wheels[1].radius, the nearest is radius_mm"),
        ("radius_mm: 201", "qqqqq: 1", ": unknown key wheels[1].qqqqq, the keys here are "
         "radius_mm, colour"),
        ("speed: 3", "", ": speed is missing"),
        ("radius_mm: 201", "colour: red", ": wheels[1].radius_mm is missing"),
        ("speed: 3", "speed: fast", ": speed ('fast') must be a number"),
        ("speed: 3", "speed: yes", ": speed (True) must be a number"),
        ("speed: 3", "speed: .inf", ": speed (inf) must be a finite number"),
        ("speed: 3", "speed: .nan", ": speed (nan) must be a finite number"),
        ("speed: 3", "speed: null", ": speed (None) must be a number"),
        ("speed: 3", "speed: 0.05", ": speed (0.05) is outside 0.1 to 200 m/s"),
        ("[1.5, 4]", "[1.5, 1e3]", ": speeds[1] ('1e3') must be a number"),
        ("[1.5, 4]", "[1.5, 1000]", ": speeds[1] (1000.0) is outside 0.1 to 200 m/s"),
        ("[1.5, 4]", "[1.5]", ": speeds has 1 entries and must have 2"),
        ("[1.5, 4]", "[9, 4]", ": speeds fall from 9.0 to 4.0"),
        ("[1.5, 4]", "4", ": speeds (4) must be a list"),
        ("is_new: false", "is_new: 0", ": is_new (0) must be true or false"),
        ("name: barrow", "name: 7", ": name (7) must be text"),
        ("2026-01-31", "yesterday", ": built_on ('yesterday') must be a date such as 2026-01-31"),
        ("2026-01-31", "2026-01-31 10:00:00", ": built_on (datetime.datetime(2026, 1, 31, 10, 0)) "
         "must be a date such as 2026-01-31"),
        ("201", "201.5", ": wheels[1].radius_mm (201.5) must be a whole number"),
        ("201", "0", ": wheels[1].radius_mm (0) is outside 1 to 1000 mm"),
        ("blue", "green", ": wheels[0].colour ('green') must be one of red, blue"),
        ("{radius_mm: 200, colour: blue}", "200", ": wheels[0] must hold `name: value` lines, not "
         "int 200"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place_and_value(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in SOUND
    assert refusal(tmp_path, SOUND.replace(old, new)) == said


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "just words"])
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert ": the file must hold `name: value` lines, not " in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    ["name: [", "a: 1\n  b: 2", "[" * 5000, "built_on: 2026-13-45", "name: !!python/object:os.x {}",
     "name: a\nspeed: 1\nname: b", "? [1]\n: 2", "x: &a [*a]\ny: *b"],
    ids=["open", "indent", "deep", "date", "python", "twice", "list-as-key", "no-anchor"],
)  # fmt: skip
def test_yaml_that_is_not_sound_is_refused(tmp_path: Path, text: str) -> None:
    assert " is not sound YAML: " in refusal(tmp_path, text)


def test_a_key_that_stands_there_twice_is_named(tmp_path: Path) -> None:
    assert "radius_mm stands there twice" in refusal(
        tmp_path, SOUND.replace("colour: blue", "radius_mm: 5")
    )


def test_every_truncation_is_refused_or_is_a_shorter_sound_file(tmp_path: Path) -> None:
    for end in range(len(SOUND)):
        try:
            cart = read(tmp_path, SOUND[:end])
        except ConfigError:
            continue
        assert cart.name == "barrow"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(Cart, path, remedy=REMEDY)
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(Cart, tmp_path / "noise.yaml", remedy=REMEDY)


WHEELS = st.builds(Wheel, radius_mm=st.integers(1, 1000), colour=st.sampled_from(("red", "blue")))
SPEEDS = st.floats(0.1, 200)


@given(
    cart=st.builds(
        Cart,
        name=st.text(),
        speed=SPEEDS,
        is_new=st.booleans(),
        built_on=st.none() | st.dates(),
        speeds=st.none() | st.tuples(SPEEDS, SPEEDS).map(lambda pair: tuple(sorted(pair))),
        tags=st.lists(st.text()).map(tuple),
        wheels=st.lists(WHEELS).map(tuple),
        spare=st.none() | WHEELS,
    )
)
def test_what_is_saved_is_read_back_as_the_same(
    cart: Cart, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("saved") / "cart.yaml"
    save_config(cart, path, heading="a cart")
    assert load_config(Cart, path, remedy=REMEDY) == cart
    assert parse_config(Cart, plain_config(cart), source="here", remedy=REMEDY) == cart
    assert [file.name for file in path.parent.iterdir()] == ["cart.yaml"]


def test_a_list_of_small_mappings_takes_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "cart.yaml"
    save_config(read(tmp_path, SOUND), path, heading="a cart")
    assert path.read_text().splitlines()[-2:] == [
        "- {radius_mm: 200, colour: blue}",
        "- {radius_mm: 201, colour: red}",
    ]


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    cart = read(tmp_path, SOUND)
    with pytest.raises(ConfigError, match="cannot be written"):
        save_config(cart, tmp_path / "no folder" / "cart.yaml", heading="a cart")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_config(cart, tmp_path, heading="a cart")
    assert [file.name for file in tmp_path.iterdir()] == ["cart.yaml"]
