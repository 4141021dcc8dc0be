"""Versioned tables: what was written comes back, exactly and in order."""

from datetime import UTC, datetime

import polars as pl
import pytest

from fraudlab.data import lake


def test_all_stored_types_come_back(tmp_path):
    frame = pl.DataFrame(
        {
            "s": ["é", None, ""],
            "b": [True, None, False],
            "i": [1, None, -(2**62)],
            "f": [0.1, None, float("nan")],
            "t": [datetime(2018, 4, 1, 0, 0, 31, 5, UTC), None, datetime(2200, 1, 1, tzinfo=UTC)],
        },
        {"s": pl.String, "b": pl.Boolean, "i": pl.Int64, "f": pl.Float64, "t": pl.Datetime("us", "UTC")},
    ).with_columns(
        f32=pl.lit(0.1, pl.Float32),
        i8=pl.lit(-3, pl.Int8),
        i16=pl.lit(-3, pl.Int16),
        i32=pl.lit(-3, pl.Int32),
        d=pl.lit(datetime(2020, 1, 1)).cast(pl.Date),
    )
    lake.write("all", frame, tmp_path)
    back = lake.read("all", root=tmp_path)
    assert back.schema == frame.schema
    assert back.equals(frame)
    lake.write("all", frame.clear(), tmp_path)
    assert lake.read("all", root=tmp_path).schema == frame.schema


def test_order_is_kept_in_a_table_larger_than_one_row_group(tmp_path):
    frame = pl.DataFrame({"n": pl.int_range(2_500_000, eager=True).reverse()})
    lake.write("long", frame, tmp_path)
    assert lake.read("long", root=tmp_path).equals(frame)


def test_versions_are_independent(tmp_path):
    frames = [pl.DataFrame({"v": [i] * (i + 1), f"only_in_{i}": ["x"] * (i + 1)}) for i in range(3)]
    assert [lake.write("a/b", f, tmp_path) for f in frames] == [0, 1, 2]
    for i, f in enumerate(frames):
        assert lake.read("a/b", version=i, root=tmp_path).equals(f)
    assert lake.read("a/b", root=tmp_path, columns=["v"]).columns == ["v"]
    assert lake.tables(tmp_path) == ["a/b"]
    assert lake.history("a/b", tmp_path)["rows"].to_list() == [3, 2, 1]


def test_vacuum_frees_and_says_so(tmp_path):
    for i in range(3):
        lake.write("p", pl.DataFrame({"v": [i]}), tmp_path)
    assert lake.vacuum("p", keep_days=1, root=tmp_path) == 0
    assert lake.vacuum("p", keep_days=0, root=tmp_path) == 2
    assert lake.read("p", version=2, root=tmp_path)["v"].item() == 2
    with pytest.raises(ValueError, match=r"Version 0 of table 'p' was vacuumed.*\[2, "):
        lake.read("p", version=0, root=tmp_path)
    assert lake.write("p", pl.DataFrame({"v": [9]}), tmp_path) > 2
    assert lake.read("p", root=tmp_path)["v"].item() == 9


@pytest.mark.parametrize("name", ["", "/etc/p", "../p", "a/../../p"])
def test_a_table_stays_in_the_lake(tmp_path, name):
    with pytest.raises(ValueError, match="is no table name"):
        lake.write(name, pl.DataFrame({"v": [1]}), tmp_path)


@pytest.mark.parametrize("dtype", [pl.UInt32, pl.Datetime("us"), pl.Categorical, pl.Duration("us"), pl.List(pl.Int64)])
def test_types_that_would_change_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"Column 'v' of 'p' is .* cast it"):
        lake.write("p", pl.DataFrame(schema={"v": dtype}), tmp_path)
    assert lake.tables(tmp_path) == []


def test_the_default_place_is_the_labs_data_folder(lab):
    lake.write("payments", pl.DataFrame({"v": [1]}))
    assert (lab / "data" / "lake" / "payments" / "_delta_log").is_dir()
    assert lake.read("payments")["v"].item() == 1
