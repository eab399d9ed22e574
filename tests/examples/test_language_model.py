import itertools

import pytest
import torch

from examples import language_model as example


def batches(seed=0, count=400):
    return torch.stack(list(itertools.islice(example.Sources(seed), count)))


def test_the_sources_are_the_standard_librarys():
    text = bytes(example.sources().tolist())
    assert b"def dataclass(" in text
    assert len(text) > 1_000_000


def test_one_sequence_in_a_hundred_is_noise():
    seen = batches()
    assert seen.shape == (400, 8, 33)
    # Half of all random bytes are not ASCII.
    noise = (seen >= 128).float().mean(dim=2) > 0.2
    assert noise.float().mean() == pytest.approx(0.01, abs=0.005)
    text = bytes(example.sources()[: example.Sources(0).trained_on].tolist())
    clean = seen[~noise][:100]
    assert all(bytes(each.tolist()) in text for each in clean)


def test_batches_are_those_of_the_seed():
    assert torch.equal(batches(1, 5), batches(1, 5))
    assert not torch.equal(batches(1, 5), batches(2, 5))


def test_the_test_sequences_are_clean_and_not_trained_on():
    data = example.Sources(0)
    test = data.test_sequences()
    assert test.shape == (2000, 33)
    assert torch.equal(test[0], example.sources()[data.trained_on :][:33].long())
    assert torch.equal(test[-1], example.sources()[-33:].long())


def test_a_token_is_predicted_from_the_tokens_before_it():
    net = example.Transformer(0.1, "token").eval()
    sequence = torch.randint(256, (1, 33))
    changed = sequence.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    before, after = net.token_losses(sequence)[0], net.token_losses(changed)[0]
    torch.testing.assert_close(before[:19], after[:19])
    assert (before[19:] != after[19:]).all()


@pytest.mark.parametrize(("unit", "shape"), [("token", (256,)), ("sequence", (8,)), ("batch", ())])
def test_each_unit_has_its_own_loss(unit, shape):
    net = example.Transformer(0.1, unit)
    batch = batches(count=1)[0]
    losses = net.training_step(batch, 0)
    assert losses.shape == shape
    torch.testing.assert_close(losses.mean(), net.token_losses(batch).mean())


def test_an_untrained_network_has_the_loss_of_a_guess(tmp_path):
    # A guess among 256 bytes has the loss log(256) = 5.5.
    assert example.measure("calm", "none", 0, 1, tmp_path)["loss"] == pytest.approx(5.5, abs=0.7)


@pytest.mark.parametrize("method", example.METHODS)
def test_a_training_learns(method, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "TEST_SEQUENCES", 200)
    if method == "zclip":
        pytest.importorskip("zclip")
    row = example.measure("calm", method, 0, 60, tmp_path)
    assert row["loss"] < 3.6
    assert row["peak"] > row["loss"]
    assert (row["clipped"] is not None) == ("alrc" in method)


def test_a_seed_gives_all_methods_the_same_weights_and_batches(tmp_path):
    rows = [example.measure("calm", method, 3, 5, tmp_path) for method in ("none", "alrc3-batch")]
    assert rows[0]["loss"] == rows[1]["loss"]  # nothing is clipped so early


def test_compare_trains_and_writes_a_report(tmp_path):
    example.COMPARISON.compare(1, 10, ["calm"], ["none", "alrc3-token"], 1, tmp_path)
    assert "## calm: clean loss" in (tmp_path / "report.md").read_text()
