"""The one reader of settings: types, ranges, unknown names, where a value is, and what overrides what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from mto_analysis.runtime.settings import (
    Count,
    Fraction,
    Options,
    Positive,
    Reader,
    Rising,
    Settings,
    Within,
    bundled_names,
    open_settings,
)


@dataclass(frozen=True)
class Inner(Settings):
    rate: Positive = 0.1
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer(Settings):
    epochs: Count
    flip: Fraction = 0.5
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    windows: tuple[Annotated[tuple[float, float], Rising()], ...] = ()
    clip: Positive | None = None
    on: bool = False
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, 1)", (0, 0.5), (-1, 1), "must lie in [0, 1)"),
        ("(0, 1]", (0.5, 1), (0, 2), "must lie in (0, 1]"),
        ("[1, inf)", (1, 9), (0, math.inf, math.nan), "must be at least 1"),
        ("(0, inf)", (1e-9,), (0, -1), "must be above 0"),
    ],
)
def test_within__is_an_interval(interval, inside, outside, words) -> None:
    rule = Within(interval)
    assert all(value in rule for value in inside)
    assert not any(value in rule for value in outside)
    assert str(rule) == words


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1, "flip": 1.5}, r"flip must lie in \[0, 1\], got 1.5"),
        ({"epochs": 1, "betas": (0.9, 1.2)}, r"betas must lie in \[0, 1\], got 1.2"),
        ({"epochs": 1, "windows": ((0.0, 1.0), (2.0, 1.0))}, r"windows must rise, got \(2.0, 1.0\)"),
        ({"epochs": 1, "clip": math.nan}, "clip must be finite, got nan"),
    ],
)
def test_settings__check_ranges_when_they_are_made(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Outer(**values)


def test_reader__lays_options_over_the_file_over_defaults_and_knows_which() -> None:
    options = Options({"flip": "0.25", "betas": "0.5, 0.75", "on": "yes", "clip": "none"})
    reader = Reader("mine.toml", {"epochs": 3, "flip": 1, "clip": 2, "inner": {"rate": 1}}, options)
    assert reader.read(Outer) == Outer(3, 0.25, (0.5, 0.75), (), None, True, Inner(1.0))
    assert reader.sources == {
        "epochs": "mine.toml",
        "flip": "--set",
        "betas": "--set",
        "clip": "--set",
        "on": "--set",
        "inner": "mine.toml",
    }


def test_reader__starts_from_given_settings() -> None:
    start = Outer(7, clip=1.0)
    assert Reader("", {"flip": 0}).read(Outer, start) == Outer(7, flip=0.0, clip=1.0)
    assert Reader("").read(Outer, start) == start


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, {}, "mine.toml: lacks epochs"),
        ({"epochs": "3"}, {}, "mine.toml: epochs must be a whole number, got '3'"),
        ({"epochs": True}, {}, "mine.toml: epochs must be a whole number, got True"),
        ({"epochs": 0}, {}, "mine.toml: epochs must be at least 1, got 0"),
        ({"epochs": 3}, {"epochs": "three"}, "--set: epochs must be a whole number, got 'three'"),
        ({"epochs": 3}, {"flip": "2"}, "--set: flip must lie in [0, 1], got 2.0"),
        ({"epochs": 3}, {"betas": "0.9"}, "--set: betas must be 2 numbers, got [0.9]"),
        ({"epochs": 3, "on": 1}, {}, "mine.toml: on must be true or false, got 1"),
        ({"epochs": 3, "clip": "a"}, {}, "mine.toml: clip must be a number or none, got 'a'"),
        ({"epochs": 3, "epoch": 3}, {}, "mine.toml: no setting is called 'epoch'; known are epochs, flip, betas"),
        ({"epochs": 3}, {"epoch": "3"}, "--set: no setting is called 'epoch'; known are epochs, flip, betas"),
        ({"epochs": 3, "inner": {"rat": 1}}, {}, "mine.toml: inner: no setting is called 'rat'; known are rate, kind"),
        ({"epochs": 3, "inner": {"kind": "c"}}, {}, "mine.toml: inner: kind must be one of a, b, got 'c'"),
        ({"epochs": 3, "inner": 4}, {}, "mine.toml: inner must be a table or none, got 4"),
    ],
)
def test_reader__says_what_is_wrong_and_where(values, options, message) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        Reader("mine.toml", values, Options(options)).read(Outer)
    assert str(error.value).startswith(message)


def test_reader__of_tables_names_their_path() -> None:
    options = Options({"arms.big.rate": "3", "part.kind": "b"})
    reader = Reader("mine.toml", {"arms": [{"name": "small"}, {"name": "big"}], "part": {"rate": 2}}, options)
    rates = [(each.take("name", str), each.take("rate", Positive, 1.0)) for each in reader.tables("arms")]
    assert rates == [("small", 1.0), ("big", 3.0)]
    assert reader.table("part").read(Inner) == Inner(2.0, "b")
    reader.end()
    wrong = Reader("mine.toml", {"part": {"rate": -1.0}}).table("part")
    with pytest.raises(ValueError, match=r"^mine\.toml: part\.rate must be above 0, got -1\.0$"):
        wrong.read(Inner)
    with pytest.raises(ValueError, match=r"^mine\.toml: arms must be an array of tables"):
        Reader("mine.toml", {"arms": {}}).tables("arms")


def test_options__that_are_shared_leave_the_rest_to_others() -> None:
    options = Options({"rate": "3", "depth": "4"}, shared=True)
    assert Reader("mine.toml", {}, options).read(Inner) == Inner(3.0)
    assert options.left == {"depth": "4"}


def test_open_settings__finds_bundled_and_own_files(tmp_path) -> None:
    reader, folder = open_settings("recipes", "mae_cifar10")
    assert folder is None
    assert reader.raw("name") == "mae_cifar10"
    path = tmp_path / "mine.toml"
    path.write_text("epochs = 3")
    reader, folder = open_settings("recipes", path)
    assert (reader.raw("name"), folder) == ("mine", tmp_path)
    path.write_text("epochs = ")
    with pytest.raises(ValueError, match=r"mine\.toml is not TOML"):
        open_settings("recipes", path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"mine\.toml cannot be read"):
        open_settings("recipes", path)
    with pytest.raises(ValueError, match=r"no recipe is called 'none', nor is it a file; known are .*mae_cifar10"):
        open_settings("recipes", "none")
    assert "mae_cifar10" in bundled_names("recipes")
