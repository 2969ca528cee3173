import numpy as np
import pytest

from crossover_jax.islands.ledger import Ledger, Publication


def mixed(segment, offered, mine, theirs):
    return (offered[0] + (theirs[0] - mine[0]) / 2,)


def publication(number, *values):
    return Publication(number, [(np.array([value]),) for value in values], max(values))


def test_a_segment_takes_part_in_one_exchange_at_a_time():
    ledger = Ledger(2, 1, mixed)
    assert ledger.reserve(0, "a") is None  # nothing is published
    ledger.publish(publication(1, 1.0, 2.0))
    assert ledger.reserve(0, "a").number == 1
    assert ledger.reserve(0, "b") is None
    assert ledger.reserve(1, "b").number == 1
    ledger.abort("a")
    assert ledger.reserve(0, "c").number == 1


def test_an_exchange_is_decided_once():
    ledger = Ledger(1, 1, mixed)
    ledger.publish(publication(1, 1.0))
    ledger.reserve(0, "a")
    assert ledger.commit("a", (np.array([5.0]),))
    assert ledger.commit("a", (np.array([5.0]),))  # said again, it is still true
    assert ledger.abort("a") == "committed"
    assert len(ledger.take(2)) == 1
    assert ledger.take(3) == []

    ledger.publish(publication(3, 3.0))
    ledger.reserve(0, "b")
    assert ledger.abort("b") == "aborted"
    assert not ledger.commit("b", (np.array([7.0]),))
    assert ledger.abort("never heard of") == "aborted"
    assert ledger.reserve(0, "never heard of") is None  # who was told so must not see it begin later


def test_what_was_reserved_of_an_older_publication_is_a_difference_to_that_one():
    ledger = Ledger(1, 1, mixed)
    ledger.publish(publication(1, 1.0))
    ledger.reserve(0, "a")
    ledger.publish(publication(2, 10.0))
    ledger.commit("a", (np.array([5.0]),))
    (arrival,) = ledger.take(3)
    assert arrival.mine[0] == 1.0


def test_a_publication_from_before_the_last_difference_is_not_on_offer():
    ledger = Ledger(1, 1, mixed)
    ledger.publish(publication(1, 1.0))
    ledger.reserve(0, "a")
    ledger.commit("a", (np.array([5.0]),))
    assert not ledger.is_offered(0)  # its difference is not yet added
    ledger.take(3)
    ledger.publish(publication(2, 1.0))  # packed before, and late to arrive
    assert not ledger.is_offered(0)
    ledger.publish(publication(3, 3.0))
    assert ledger.is_offered(0)


class Forgetful(Ledger):
    """Does not remember when the last difference was added."""

    def take(self, next_number):
        arrived = super().take(next_number)
        self._packed_from = [0] * len(self._packed_from)
        return arrived


@pytest.mark.parametrize("age", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", [Ledger, Forgetful])
def test_exchanges_of_publications_of_any_age_converge_and_without_that_rule_they_do_not(kind, age):
    rng, n = np.random.default_rng(age), 16
    x = rng.standard_normal(n)
    before, mean = x.std(), x.mean()
    ledgers, packed = [kind(1, 1, mixed) for _ in range(n)], [[] for _ in range(n)]
    for t in range(1, 400):
        for i, ledger in enumerate(ledgers):
            for arrival in ledger.take(t):
                x[i] += (arrival.theirs[0][0] - arrival.mine[0][0]) / 2
            packed[i].append(publication(t, x[i]))
            ledger.publish(packed[i][max(0, len(packed[i]) - 1 - age)])
        for i, j in rng.permutation(n).reshape(-1, 2):
            id = f"{t} {i}"
            mine = ledgers[i].reserve(0, id)
            theirs = ledgers[j].reserve(0, id) if mine else None
            for own, other in ((i, theirs), (j, mine)):
                if theirs is None:
                    ledgers[own].abort(id)
                else:
                    ledgers[own].commit(id, other.segments[0])
        if x.std() > 1e6:
            break
    assert abs(x.mean() - mean) < 1e-9 * max(1, x.std())
    if kind is Forgetful and age >= 2:
        assert x.std() > 1e6
    else:
        assert x.std() < 1e-3 * before


def test_a_publication_goes_through_so_many_rounds_each_of_what_the_last_one_made():
    ledger = Ledger(1, 2, mixed)
    ledger.publish(publication(1, 1.0))
    ledger.reserve(0, "a")
    ledger.commit("a", (np.array([5.0]),))
    assert ledger.reserve(0, "b").segments[0][0] == 3.0
    ledger.commit("b", (np.array([7.0]),))
    assert not ledger.is_offered(0)  # two rounds
    differences = [(arrival.theirs[0] - arrival.mine[0]).item() / 2 for arrival in ledger.take(2)]
    assert differences == [2.0, 2.0]
    ledger.publish(publication(2, 5.0))
    assert ledger.is_offered(0)


def test_what_arrives_late_is_in_what_is_offered_next():
    ledger = Ledger(1, 3, mixed)
    ledger.publish(publication(1, 1.0))
    ledger.reserve(0, "a")
    ledger.publish(publication(2, 10.0))  # packed before the difference was added
    ledger.commit("a", (np.array([5.0]),))
    assert ledger.reserve(0, "b").segments[0][0] == 12.0
    ledger.commit("b", (np.array([4.0]),))
    ledger.publish(publication(3, 100.0))  # and so was this one
    assert ledger.reserve(0, "c").segments[0][0] == 100.0 + 2.0 - 4.0
    ledger.abort("c")
    assert [(arrival.theirs[0] - arrival.mine[0]).item() / 2 for arrival in ledger.take(4)] == [2.0, -4.0]
    assert not ledger.is_offered(0)
    ledger.publish(publication(4, 98.0))
    assert ledger.is_offered(0)


def test_between_two_takes_a_segment_goes_through_so_many_rounds_and_no_more():
    """Several hosts of an island add so many, whatever came: one more would be one program more on one host."""
    ledger = Ledger(1, 2, mixed)
    for number in range(1, 10, 2):
        assert len(ledger.take(number)) == (2 if number > 1 else 0)
        ledger.publish(publication(number, 1.0))
        ledger.reserve(0, f"{number} late")
        assert ledger.take(number + 1) == []
        ledger.publish(publication(number + 1, 1.0))
        ledger.commit(f"{number} late", (np.array([5.0]),))
        assert ledger.is_offered(0)
        ledger.reserve(0, f"{number} in time")
        ledger.commit(f"{number} in time", (np.array([5.0]),))
        assert not ledger.is_offered(0)


class Blind(Ledger):
    """Offers what is packed, without the differences that are still to be added."""

    def publish(self, publication):
        self.now = publication


@pytest.mark.parametrize("seconds", [0, 3, 10])  # of an exchange; a publication lasts 8
def test_exchanges_of_any_length_are_those_of_what_each_will_be(seconds):
    """With differences that are still to be added an exchange leaves both at their mean, and so all converge."""
    apart, std = _exchanged(Ledger, seconds)
    assert apart < 1e-12
    assert std < 1e-9
    assert _exchanged(Blind, 3)[0] > 0.1


def _exchanged(kind, seconds, n=16):
    """The largest difference of two after their exchange, and of all in the end."""
    rng, numbers, apart = np.random.default_rng(seconds), [0] * n, 0.0
    x, ledgers, going = rng.standard_normal(n), [kind(1, 3, mixed) for _ in range(n)], []
    packed, mean = [publication(0, value) for value in x], x.mean()

    def added(arrivals):
        return sum((arrival.theirs[0][0] - arrival.mine[0][0]) / 2 for arrival in arrivals)

    for now in range(3000):
        for i, ledger in enumerate(ledgers):
            if (now + i) % 8 == 0:
                numbers[i] += 1
                x[i] += added(ledger.take(numbers[i]))
                packed[i] = publication(numbers[i], x[i])
            if (now + i) % 8 == 2:  # what is packed takes a while to come to the host
                ledger.publish(packed[i])
        i, j = rng.choice(n, 2, replace=False)
        mine, theirs = (ledgers[own].reserve(0, str(now)) for own in (i, j))
        if mine and theirs:
            going.append((now + seconds, str(now), (i, theirs.segments[0]), (j, mine.segments[0])))
        else:
            ledgers[i].abort(str(now)), ledgers[j].abort(str(now))
        while going and going[0][0] <= now:
            _, id, *sides = going.pop(0)
            for own, other in sides:
                ledgers[own].commit(id, other)
            one, another = (x[own] + added(ledgers[own]._arrived) for own, _ in sides)
            apart = max(apart, abs(one - another))
    x += [added(ledger._arrived) for ledger in ledgers]
    assert abs(x.mean() - mean) < 1e-12
    return apart, x.std()
