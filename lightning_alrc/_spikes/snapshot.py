"""A snapshot of a batch."""

from __future__ import annotations

import io
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Snapshot", "rebuilt"]

GEOMETRIC = [
    f"torch_geometric.data.{name}"
    for name in (
        "batch.Batch",
        "batch.DynamicInheritanceGetter",
        "data.Data",
        "data.DataEdgeAttr",
        "data.DataTensorAttr",
        "feature_store.TensorAttr",
        "graph_store.EdgeAttr",
        "graph_store.EdgeLayout",
        "hetero_data.HeteroData",
        "storage.BaseStorage",
        "storage.EdgeStorage",
        "storage.GlobalStorage",
        "storage.NodeStorage",
        "temporal.TemporalData",
    )
]
"""Classes in batches of PyTorch Geometric. They are allowed by default, because rebuilding an
object of these classes only stores tensors. They are not imported here."""


class Snapshot:
    """A batch as it is when the snapshot is taken.

    Everything except tensors is copied at once, by pickle. So a batch may be of any class that can
    be pickled. Tensors are copied only by :meth:`take_copy`, and only if the batch is kept. If a
    tensor was changed in place before that, :meth:`has_changed` returns ``True``.

    Args:
        batch: any object that can be pickled.

    Raises:
        Exception: whatever pickle raises for an object that it cannot pickle.
    """

    def __init__(self, batch: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(batch)
        self._pickled = file.getvalue()
        self._tensors = pickler.tensors
        self._has_objects = pickler.has_objects
        self._versions = [_version(each) for each in self._tensors]
        self._require_gradients = [each.requires_grad for each in self._tensors]

    def has_changed(self) -> bool:
        """Whether a tensor was changed in place after the snapshot. If so, the batch is lost.

        Changes by NumPy or through ``Tensor.data`` are not noticed.
        """
        return [_version(each) for each in self._tensors] != self._versions

    def take_copy(self) -> dict[str, Any]:
        """The batch on the CPU, for ``torch.save``. ``torch.load(weights_only=True)`` can load it.

        Returns:
            ``{"batch": batch}`` if the batch has only dicts, lists, tuples, tensors, numbers and
            strings. Otherwise a dict for :func:`rebuilt`: ``"tensors"``, and the rest as
            ``"pickled"``.
        """
        # A tensor may be a view of a dataset in memory. If the tensor were not copied, torch.save
        # would save the whole dataset.
        tensors = [each.detach().to("cpu", copy=True) for each in self._tensors]
        for tensor, requires_gradients in zip(tensors, self._require_gradients, strict=True):
            tensor.requires_grad_(requires_gradients)
        if not self._has_objects:
            batch = _Unpickler(self._pickled, tensors, None).load()
            if _is_plain(batch):
                return {"batch": batch}
        pickled = torch.frombuffer(bytearray(self._pickled), dtype=torch.uint8)
        return {"pickled": pickled, "tensors": tensors}


def rebuilt(content: Mapping[str, Any]) -> Any:
    """The batch from what :meth:`Snapshot.take_copy` returned.

    The batch may have only classes that ``torch.serialization.safe_globals`` or :data:`GEOMETRIC`
    allows. Nothing is imported.

    Raises:
        Exception: whatever pickle raises, for example for a class that is not allowed.
    """
    pickled = bytes(content["pickled"].tolist())
    return _Unpickler(pickled, content["tensors"], _allowed()).load()


class _Pickler(pickle.Pickler):
    """Pickles everything except tensors and numeric arrays, which are collected in a list."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.tensors: list[Tensor] = []
        self.has_objects = False
        """whether the batch has objects other than tensors, numbers, strings and collections"""

    def reducer_override(self, obj: Any) -> Any:
        # Pickle does not call this method for Python's own collections, numbers and strings.
        if obj is _tensor or obj is _plain:
            return NotImplemented
        if isinstance(obj, Tensor):
            if type(obj) is Tensor or type(obj).__module__.startswith("torch."):
                return _tensor, (self._add_tensor(obj),)
            self.has_objects = True
            return _as_subclass, (obj.as_subclass(Tensor), type(obj), dict(vars(obj)))
        numpy = sys.modules.get("numpy")
        if numpy is not None and (type(obj) is numpy.ndarray or isinstance(obj, numpy.generic)):
            return self._reduced_array(numpy, obj)
        self.has_objects = True
        return NotImplemented

    def _reduced_array(self, numpy: Any, obj: Any) -> Any:
        """The function and the arguments that rebuild an array, or a number or string of NumPy.

        Raises:
            pickle.PicklingError: if the array has a dtype that cannot be rebuilt.
        """
        if isinstance(obj, (numpy.str_, numpy.bytes_)):
            self.has_objects = self.has_objects or isinstance(obj, bytes)
            return _plain, (obj.item(),)
        self.has_objects = True
        is_number, array = isinstance(obj, numpy.generic), numpy.array(obj, order="C")
        try:
            return _array, (self._add_tensor(torch.from_numpy(array)), is_number)
        except (TypeError, ValueError):  # PyTorch has no such dtype, or not in this byte order
            kind = array.dtype.kind
        if kind == "O":
            return _array_of_objects, (list(array.flat), array.shape)
        if kind in "VT":  # with fields, or with strings of any length
            raise pickle.PicklingError(f"a NumPy array of dtype {array.dtype} is not kept")
        copied = torch.from_numpy(numpy.frombuffer(bytearray(array.tobytes()), numpy.uint8))
        return _array_of_bytes, (self._add_tensor(copied), array.dtype.str, array.shape, is_number)

    def _add_tensor(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1


# Only the unpickler that is written in Python has a method for each opcode. A subclass can override
# such a method.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickles, and puts the tensors back.

    Args:
        pickled: output of :class:`_Pickler`.
        tensors: the tensors that the pickler collected.
        allowed: the allowed classes, by full name. ``None`` allows all classes, which is safe only
            for what this process has pickled.
    """

    def __init__(
        self, pickled: bytes, tensors: list[Tensor], allowed: Mapping[str, Any] | None
    ) -> None:
        super().__init__(io.BytesIO(pickled))
        self._tensors = tensors
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if module == __name__:
            ours = {
                "_tensor": self._tensors.__getitem__,
                "_array": self._array,
                "_array_of_bytes": self._array_of_bytes,
                "_array_of_objects": _array_of_objects,
                "_plain": _plain,
                "_as_subclass": _as_subclass,
            }
            return ours[name]
        if self._allowed is None:
            return super().find_class(module, name)
        if f"{module}.{name}" not in self._allowed:
            raise pickle.UnpicklingError(f"it has a {module}.{name}")
        return self._allowed[f"{module}.{name}"]

    def load_build(self) -> None:
        """Set the state of an object, but never of a class or function."""
        target = self.stack[-2]
        if isinstance(target, (type, FunctionType)):  # an attack: pickle never writes this
            raise pickle.UnpicklingError(f"it changes {target!r:.100} itself")
        super().load_build()

    dispatch: ClassVar[dict[int, Any]] = {**_PythonUnpickler.dispatch, pickle.BUILD[0]: load_build}

    def _array(self, index: int, is_number: bool) -> Any:
        array = self._tensors[index].numpy()
        return array[()] if is_number else array

    def _array_of_bytes(self, index: int, dtype: str, shape: Any, is_number: bool) -> Any:
        import numpy

        raw = bytearray(self._tensors[index].numpy().tobytes())
        array = numpy.frombuffer(raw, dtype).reshape(shape)
        return array[()] if is_number else array


# Pickles refer to these three by name. _Unpickler uses functions of its own in their place.
def _tensor(index: int) -> Tensor:
    raise NotImplementedError


def _array(index: int, is_number: bool) -> Any:
    raise NotImplementedError


def _array_of_bytes(index: int, dtype: str, shape: Any, is_number: bool) -> Any:
    raise NotImplementedError


def _array_of_objects(values: list[Any], shape: Any) -> Any:
    import numpy

    array = numpy.empty(len(values), object)
    for index, each in enumerate(values):  # assigned at once, lists would become rows
        array[index] = each
    return array.reshape(shape)


def _plain(value: Any) -> Any:
    return value


def _as_subclass(tensor: Tensor, kind: type[Tensor], attributes: dict[str, Any]) -> Tensor:
    if not (isinstance(kind, type) and issubclass(kind, Tensor)):
        raise pickle.UnpicklingError(f"{kind!r:.100} is not a class of tensors")
    made = tensor.detach().as_subclass(kind)
    vars(made).update(attributes)
    if tensor.requires_grad:
        made.requires_grad_()
    return made


def _allowed() -> dict[str, Any]:
    """Classes that a batch may be rebuilt with, by full name."""
    plain = [complex, Counter, OrderedDict, defaultdict, deque]
    plain += [torch.Size, torch.device, PackedSequence]
    allowed: dict[str, Any] = {_full_name(each): each for each in plain}
    allowed |= {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
    for each in torch.serialization.get_safe_globals():
        # Newer releases of PyTorch also allow a pair of the class and its full name.
        known, name = each if isinstance(each, tuple) else (each, _full_name(each))
        allowed[name] = known
    for name in GEOMETRIC:
        module, _, attribute = name.rpartition(".")
        if hasattr(sys.modules.get(module), attribute):
            allowed[name] = getattr(sys.modules[module], attribute)
    return allowed


def _full_name(each: Any) -> str:
    return f"{each.__module__}.{each.__qualname__}"


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def _is_plain(value: Any) -> bool:
    """Whether a value has only objects that ``weights_only`` always allows."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.items()))
    return type(value) in (str, int, float, bool, type(None)) or isinstance(value, Tensor)
