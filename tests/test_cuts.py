import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import crossover_jax as cj


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


@pytest.mark.parametrize("num_segments", [1, 2, 3, 7, 11])
def test_by_size_cuts_the_packed_vector_into_equal_parts(num_segments):
    tree = shapes(a=(5, 3), b=(), c=(4,))
    segments = cj.by_size(num_segments).segment_of(tree)
    packed = np.concatenate([segments[name].ravel() for name in "abc"])
    length = -(-20 // num_segments)
    np.testing.assert_array_equal(packed, np.arange(20) // length)


def test_large_segments_are_cut_at_multiples_of_the_alignment_and_small_ones_are_not_padded():
    aligned = cj.by_size(4, align=8).packings(["w"], [jax.ShapeDtypeStruct((4 * 8 * 64 + 3,), jnp.float32)])
    assert all(bound % 8 == 0 for bound in aligned[0].bounds)
    assert aligned[0].bounds[-1] - (4 * 8 * 64 + 3) < (4 * 8 * 64 + 3) / 64
    small = cj.by_size(4, align=8).packings(["w"], [jax.ShapeDtypeStruct((4 * 509,), jnp.float32)])
    assert small[0].bounds == (0, 509, 1018, 1527, 2036)


def test_by_module_numbers_modules_in_the_order_of_the_leaves_at_any_depth():
    tree = {"layers": {0: shapes(b=(2,), w=(3,)), 1: shapes(b=(2,), w=(3,))}, "out": shapes(w=(4,)), "z": shapes(w=())}
    one, two = cj.by_module(tree, 1), cj.by_module(tree, 2)
    assert (one.num_segments, two.num_segments) == (3, 4)
    np.testing.assert_array_equal(one.segment_of(tree)["layers"][1]["w"], 0)
    np.testing.assert_array_equal(two.segment_of(tree)["layers"][1]["w"], 1)
    np.testing.assert_array_equal(two.segment_of(tree)["z"]["w"], 3)


def test_by_module_of_a_function_gathers_leaves_that_are_not_neighbours():
    tree = shapes(a_even=(3,), b_odd=(2,), c_even=(4,))
    cut = cj.by_module(tree, lambda name: name.split("_")[1])
    assert cut.num_segments == 2
    assert [int(s.flat[0]) for s in jax.tree.leaves(cut.segment_of(tree))] == [0, 1, 0]
    (packing,) = cut.packings(["a_even", "b_odd", "c_even"], list(tree.values()))
    assert (packing.leaves, packing.bounds) == ((0, 2, 1), (0, 7, 9))


def test_each_dtype_is_packed_by_itself_and_integers_do_not_travel():
    tree = {
        "count": jax.ShapeDtypeStruct((2,), jnp.int32),
        "half": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
        "full": jax.ShapeDtypeStruct((4,), jnp.float32),
    }
    segments = cj.by_size(2).segment_of(tree)
    np.testing.assert_array_equal(segments["count"], [-1, -1])
    np.testing.assert_array_equal(segments["half"], [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(segments["full"], [0, 0, 1, 1])


def test_names_are_the_same_for_nnx_states_and_plain_dicts():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    cut = cj.by_module({"body": nnx.to_pure_dict(state)}, lambda name: name)
    np.testing.assert_array_equal(cut.segment_of({"body": state})["body"]["kernel"].get_value(), np.ones((2, 3)))


def test_a_leaf_called_value_keeps_its_name():
    tree = {"attn": shapes(key=(2,), value=(3,)), "mlp": shapes(w=(4,))}
    cut = cj.by_module(tree, 2)
    assert cut.num_segments == 2
    np.testing.assert_array_equal(cut.segment_of(tree)["attn"]["value"], np.zeros(3))
    assert cj.by_module(tree, lambda name: name).num_segments == 3


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="`num_segments` must be at least 1, got 0"):
        cj.by_size(0)
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        cj.by_module({}, 0)
    with pytest.raises(ValueError, match=r"as elements travel \(from each device\), 3, but it makes 4: pass"):
        cj.by_size(4).segment_of(shapes(a=(3,)))


def test_rows_are_cut_along_the_first_dimension_that_segments_divide_and_small_leaves_are_packed():
    tree = {"bias": np.zeros(5), "kernel": np.zeros((3, 8, 5)), "matrix": np.zeros((12, 4)), "odd": np.zeros((7, 3))}
    found = cj.by_rows(4, align=5).segment_of(tree)
    np.testing.assert_array_equal(found["matrix"], np.repeat([0, 1, 2, 3], 3)[:, None].repeat(4, 1))
    np.testing.assert_array_equal(found["kernel"], np.tile(np.repeat([0, 1, 2, 3], 2)[None, :, None], (3, 1, 5)))
    # 26 elements are packed, 7 to a segment.
    np.testing.assert_array_equal(found["bias"], [0] * 5)
    np.testing.assert_array_equal(found["odd"].reshape(-1), np.arange(5, 26) // 7)
    assert cj.by_rows(4, align=1024).packings(list(tree), list(tree.values())) == cj.by_size(4).packings(
        list(tree), list(tree.values())
    )
