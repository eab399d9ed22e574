from examples.comparison.settings import in_order
from tests.examples.comparison.made_up import losses_of, setting_of


def test_methods_are_in_order():
    names = ["alrc2+norm", "huber", "alrc2", "norm", "none", "agc", "norm"]
    assert in_order(names) == ["none", "norm", "agc", "huber", "alrc2", "alrc2+norm"]


def test_methods_are_in_order_of_their_means():
    rows = [*losses_of("norm", [1.0, 1.0, 10.0]), *losses_of("alrc2", [2.0, 2.0, 2.0])]
    assert list(setting_of(rows).values("train_loss")) == ["alrc2", "norm"]
