"""A batch of any class is written as tensors and plain data, and rebuilt safely."""

from __future__ import annotations

import copy
import enum
import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_alrc._spikes.snapshot import Snapshot, rebuilt


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Any


class Kind(enum.Enum):
    IMAGE = 1


class Node:
    """Refers to itself."""

    def __init__(self, x: Any) -> None:
        self.x, self.me = x, self


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Image(Tensor):
    """A subclass of Tensor with an attribute, like torchvision's."""


def image(values: Tensor) -> Image:
    made = values.as_subclass(Image)
    made.size_before = (3, 4)  # type: ignore[attr-defined]
    return made


def written_and_read(batch: Any) -> dict[str, Any]:
    """The content of a batch's snapshot after saving and loading."""
    file = io.BytesIO()
    torch.save(Snapshot(batch).take_copy(), file)
    file.seek(0)
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def again(batch: Any, *allowed: Any) -> Any:
    content = written_and_read(batch)
    with torch.serialization.safe_globals(list(allowed)):
        return content["batch"] if "batch" in content else rebuilt(content)


X = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "batch",
    [X, (X, X[0]), [X, 1, 2.5, "a", None, True], {"x": {"y": [X]}, 3: ()}],
    ids=repr,
)
def test_a_batch_of_tensors_and_collections_is_kept_as_it_is(batch: Any) -> None:
    content = written_and_read(batch)
    assert content.keys() == {"batch"}
    assert repr(content["batch"]) == repr(batch)


@pytest.mark.parametrize(
    ("batch", "allowed"),
    [
        (Pair(X, "a"), [Pair]),
        (OrderedDict(x=X), []),
        ({"x": {1, 2}, "y": frozenset([3]), "z": 1j, "b": b"bytes"}, []),
        ([torch.float16, torch.device("cpu"), X.shape], []),
        ([Kind.IMAGE], [Kind]),
        ([np.float32(0.5), np.int64(3), np.bool_(True)], []),
    ],
    ids=repr,
)
def test_a_batch_of_anything_is_rebuilt(batch: Any, allowed: list[Any]) -> None:
    found = again(batch, *allowed)
    assert type(found) is type(batch)
    assert repr(found) == repr(batch)


def test_a_parameter_is_kept_as_a_tensor() -> None:
    found = again([nn.Parameter(X)])[0]
    assert type(found) is Tensor
    assert torch.equal(found, X)


@pytest.mark.parametrize("wrap", [lambda x: [x], Node, image])
def test_tensors_that_require_gradients_do_so_when_rebuilt(wrap: Any) -> None:
    found = again([wrap(X.clone().requires_grad_()), X], Node, Image)
    tensor = found[0][0] if type(found[0]) is list else getattr(found[0], "x", found[0])
    assert tensor.requires_grad
    assert tensor.is_leaf
    assert not found[1].requires_grad


def test_objects_are_rebuilt() -> None:
    for kind in (Node, Slotted, Record):
        found = again([kind(X), {"deep": kind(X)}], kind)
        assert type(found[0]) is type(found[1]["deep"]) is kind
        assert torch.equal(found[0].x, X)
    found = again(Node(X), Node)
    assert found.me is found


def test_arrays_are_rebuilt() -> None:
    arrays = [np.arange(6).reshape(2, 3)[:, ::-1], np.float64([1.5]), np.array([True])]
    for found, expected in zip(again(arrays), arrays, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "array",
    [
        np.array([["a", "name"], ["", "猫"]]),
        np.array([b"a", b"bytes"]),
        np.array(["2020-01-01", "NaT"], "datetime64[D]"),
        np.array([1, 2], "timedelta64[ms]"),
        np.arange(6, dtype=">f4").reshape(2, 3)[:, ::-1],
        np.array(3, dtype=">i8"),
        np.zeros((0, 2), dtype="U3"),
        np.array([["a", None], [3, 2.5]], object),
        np.array([], object),
    ],
    ids=repr,
)
def test_arrays_of_any_dtype_are_rebuilt(array: Any) -> None:
    found = again({"x": array})["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert found.flags.writeable


def test_an_array_of_objects_is_rebuilt_with_its_tensors() -> None:
    array = np.empty(4, object)
    for index, each in enumerate([X, X, [1, 2], Record(X)]):
        array[index] = each
    found = again([array], Record)[0]
    assert torch.equal(found[0], X)
    assert found[1] is found[0]
    assert found[2] == [1, 2]
    assert torch.equal(found[3].x, X)


def test_strings_of_numpy_are_kept_as_strings() -> None:
    content = written_and_read([np.str_("a"), "b"])
    assert content["batch"] == ["a", "b"]
    assert type(content["batch"][0]) is str
    assert again([np.bytes_(b"a")]) == [b"a"]
    assert again([np.datetime64("2020-01-01")]) == [np.datetime64("2020-01-01")]


@pytest.mark.parametrize("dtype", [[("x", "f4")], "V3"], ids=str)
def test_an_array_that_could_not_be_rebuilt_raises_at_once(dtype: Any) -> None:
    with pytest.raises(pickle.PicklingError, match="a NumPy array of dtype "):
        Snapshot({"x": np.zeros(2, dtype)})


def test_packed_sequences_are_rebuilt() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    found = again({"x": packed})["x"]
    assert isinstance(found, PackedSequence)
    assert torch.equal(found.batch_sizes, packed.batch_sizes)


def test_tensors_of_a_subclass_are_rebuilt() -> None:
    found = again([image(X)], Image)[0]
    assert type(found) is Image
    assert found.size_before == (3, 4)
    assert torch.equal(found.as_subclass(Tensor), X)


def test_tensors_of_torchvision_are_rebuilt() -> None:
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    boxes = tv_tensors.BoundingBoxes(torch.ones(2, 4), format="XYXY", canvas_size=(5, 6))
    found = again(boxes, tv_tensors.BoundingBoxes, tv_tensors.BoundingBoxFormat)
    assert repr(found) == repr(boxes)


def graphs() -> Any:
    data = pytest.importorskip("torch_geometric.data")

    def graph(number: int) -> Any:
        edges = torch.tensor([[0, 1], [1, 2]])
        return data.Data(x=torch.randn(3, 2), edge_index=edges, id=number, name=f"m{number}")

    def mixed() -> Any:
        made = data.HeteroData()
        made["a"].x, made["b"].x = torch.randn(2, 1), torch.randn(3, 1)
        made["a", "to", "b"].edge_index = torch.tensor([[0, 1], [2, 2]])
        return made

    return [
        graph(0),
        data.Batch.from_data_list([graph(number) for number in range(3)]),
        mixed(),
        data.Batch.from_data_list([mixed(), mixed()]),
    ]


def test_graphs_of_pytorch_geometric_are_rebuilt_and_need_not_be_allowed() -> None:
    for batch in graphs():
        found = again(batch)
        assert type(found) is type(batch)
        assert repr(found) == repr(batch)
        assert repr(found.to_dict()) == repr(batch.to_dict())  # all its tensors


def test_a_snapshot_does_not_change_with_its_batch() -> None:
    tensors, node, array = {"x": X.clone()}, Node(X.clone()), np.ones(2)
    snapshot = Snapshot([tensors, node, array])
    tensors["x"] = torch.zeros(1)
    tensors["y"] = torch.zeros(1)
    node.x = None
    array[:] = 5.0
    assert not snapshot.has_changed()
    kept = snapshot.take_copy()
    with torch.serialization.safe_globals([Node]):
        tensors, node, array = rebuilt(kept)
    assert list(tensors) == ["x"]
    assert torch.equal(tensors["x"], X)
    assert torch.equal(node.x, X)
    assert array.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrap", [lambda x: x, Node, image, lambda x: {"x": [x]}])
def test_a_change_in_place_is_seen(wrap: Any) -> None:
    x = X.clone()
    snapshot = Snapshot(wrap(x))
    assert not snapshot.has_changed()
    x.mul_(2.0)
    assert snapshot.has_changed()


def test_tensors_of_inference_mode_are_kept() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    assert not Snapshot([x]).has_changed()
    assert torch.equal(again([x])[0], torch.ones(2))


def test_a_view_is_kept_without_its_base() -> None:
    whole = torch.ones(1000, 1000)
    for batch in (whole[:2], Node(whole[:2])):
        kept = Snapshot(batch).take_copy()
        (tensor,) = kept.get("tensors", [kept.get("batch")])
        assert tensor.untyped_storage().nbytes() == 8000


@pytest.mark.parametrize("batch", [lambda: None, (each for each in ()), Node(lambda: None)])
def test_an_object_that_cannot_be_pickled_raises_at_once(batch: Any) -> None:
    with pytest.raises((pickle.PicklingError, TypeError, AttributeError)):
        Snapshot(batch)


def test_a_copied_snapshot_has_the_batch() -> None:
    assert torch.equal(first_kept(copy.deepcopy(Snapshot([X]))), X)


def first_kept(snapshot: Snapshot) -> Any:
    return snapshot.take_copy()["batch"][0]


# ---- what a file may do


class Harmful:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Stateless:
    pass


class Stateful:
    ran = False

    def __setstate__(self, state: Any) -> None:
        Stateful.ran = True


def hostile(value: Any) -> dict[str, Any]:
    pickled = torch.frombuffer(bytearray(pickle.dumps(value, protocol=4)), dtype=torch.uint8)
    return {"pickled": pickled, "tensors": [X]}


@pytest.mark.parametrize(
    "value",
    [
        Harmful(print, "this ran"),
        Harmful(eval, "print('this ran')"),
        Harmful(getattr, X, "numpy"),
        [Harmful(__import__, "os")],
        Stateful(),
        nn.Linear(1, 1),
    ],
)
def test_a_file_runs_nothing_that_is_not_allowed(
    value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"it has a \w+\."):
        rebuilt(hostile(value))
    assert "this ran" not in capsys.readouterr().out
    assert not Stateful.ran


def test_a_name_with_dots_reaches_no_attribute_of_an_allowed_class() -> None:
    """The pickle names ``Pair.__doc__``. Such names could reach ``__globals__`` of a method."""
    pickled = b"\x80\x04\x8c" + bytes([len(__name__)]) + __name__.encode()
    pickled += b"\x8c\x0cPair.__doc__\x93."
    content = {"pickled": torch.frombuffer(bytearray(pickled), dtype=torch.uint8), "tensors": []}
    with (
        torch.serialization.safe_globals([Pair]),
        pytest.raises(pickle.UnpicklingError, match="it has a"),
    ):
        rebuilt(content)


def test_an_array_of_objects_is_not_made_of_bytes() -> None:
    """NumPy would take the bytes for addresses of objects."""
    from lightning_alrc._spikes.snapshot import _array_of_bytes

    content = hostile(Harmful(_array_of_bytes, 0, "O", (3,), False))
    content["tensors"] = [torch.zeros(24, dtype=torch.uint8)]
    with pytest.raises(ValueError, match="OBJECT array"):
        rebuilt(content)


def test_an_allowed_class_is_not_changed() -> None:
    # The pickle tries to set state on the class itself, not on an instance.
    made = pickle.dumps(Stateless, protocol=4)[:-1]
    state = pickle.dumps((None, {"size": 5}), protocol=2)[2:-1]
    content = hostile(None)
    content["pickled"] = torch.frombuffer(bytearray(made + state + b"b."), dtype=torch.uint8)
    with (
        torch.serialization.safe_globals([Stateless]),
        pytest.raises(pickle.UnpicklingError, match=r"it changes .*Stateless"),
    ):
        rebuilt(content)
    assert not hasattr(Stateless, "size")


def test_a_subclass_of_something_else_is_refused() -> None:
    from lightning_alrc._spikes.snapshot import _as_subclass

    content = hostile(Harmful(_as_subclass, 1, Pair, {}))
    with (
        torch.serialization.safe_globals([Pair]),
        pytest.raises(pickle.UnpicklingError, match="not a class of tensors"),
    ):
        rebuilt(content)
