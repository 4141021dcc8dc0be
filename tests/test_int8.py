"""Weights as bytes: nothing changes on the way, whatever the numbers, and little by the rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fraudlab.models.int8 import SCALE, packed, rounded, unpacked

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)
MATRICES = arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=NUMBERS)


@settings(deadline=None, max_examples=200)
@given(MATRICES)
def test_what_is_packed_is_unpacked_bit_by_bit(matrix):
    for weights in ({"a.kernel": matrix, "fixed.a": matrix}, rounded({"a.kernel": matrix, "fixed.a": matrix})):
        again = unpacked(packed(weights))
        assert again.keys() == weights.keys()
        for key, value in weights.items():
            assert again[key].dtype == value.dtype
            assert again[key].tobytes() == value.tobytes()


@settings(deadline=None, max_examples=200)
@given(MATRICES)
def test_a_rounded_matrix_is_near_and_a_byte_a_number(matrix):
    small = rounded({"a.kernel": matrix})["a.kernel"]
    if matrix.ndim < 2:
        assert small is matrix
        return
    largest = np.abs(matrix).max(axis=-2, keepdims=True)
    assert (np.abs(small - matrix) <= largest / 127 + 1e-37).all()
    stored = packed({"a.kernel": small})
    assert stored["a.kernel"].dtype == np.int8
    assert stored["a.kernel" + SCALE].shape == largest.shape


@pytest.mark.parametrize("value", [np.zeros((3, 2), np.float32), np.full((3, 2), 1e-44, np.float32), np.zeros((0, 4), np.float32)])
def test_columns_of_nothing_stay_numbers(value):
    again = unpacked(packed(rounded({"a": value})))["a"] if value.size else unpacked(packed({"a": value}))["a"]
    assert np.isfinite(again).all()
    assert again.shape == value.shape
