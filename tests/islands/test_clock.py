from crossover_jax.islands.clock import Clock


def test_merging_is_idempotent_and_in_any_order():
    one, two, three = {"a@1": 5.0, "b@1": 2.0}, {"b@1": 7.0}, {"a@1": 3.0, "a@2": 1.0}
    expected = {"a@1": 5.0, "b@1": 7.0, "a@2": 1.0}
    for order in ((one, two, three), (three, two, one), (two, one, three, one, two)):
        clock = Clock()
        for counts in order:
            clock.merge(counts)
        assert clock.counts == expected
        assert clock.total == 13.0


def test_a_life_that_has_ended_still_counts():
    clock = Clock()
    clock.add("a@1", 64)
    clock.add("a@2", 64)
    assert clock.total == 128
