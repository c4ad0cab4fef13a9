"""Arrays at the border: NumPy arrays and torch tensors, checked once and viewed as what the core or the kernels take.

What comes in decides where it is computed: NumPy arrays and CPU tensors in Rust, CUDA tensors (those of AMD's ROCm
have this name too) in Triton. torch is never imported: a tensor is recognised by its class, and is viewed through its
own methods. NumPy has no bfloat16 and no FP8 of its own, so those cross as uint16 and uint8 views of the same memory
(`ml_dtypes` arrays are recognised by name).
"""

from __future__ import annotations

import math
import operator
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

#: A NumPy array or a torch tensor; what comes in decides what goes out.
A = TypeVar("A", "np.ndarray[Any, Any]", "torch.Tensor")

BACKENDS = ("auto", "cpu", "triton", "reference")
FLOATS = ("float32", "bfloat16", "float16")
#: dtypes that NumPy lacks, with the one of the same width they are viewed as.
_VIEWS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}


@dataclass(frozen=True)
class View:
    """One checked argument: `data` is the caller's own memory, C-contiguous (or else a contiguous copy).

    `data` is a NumPy array, and a torch tensor in a call that Triton computes.
    """

    data: Any
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def float64(self) -> np.ndarray[Any, Any]:
        """The values, for the references."""
        if self.dtype == "bfloat16":
            return (self.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if self.dtype == "float8_e4m3fn":
            from heedful.ops import reference

            return reference.e4m3_values()[self.data]
        return self.data.astype(np.float64)


class Arguments:
    """The arguments of one call: views them, binds dimension letters to sizes, gives results back in kind.

    The first array decides where the call is computed; every other one must be there too.
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend = backend
        self.reference = backend == "reference"
        self.triton = False
        """Whether Triton computes the call; known once the first array was taken."""
        self.sizes: dict[str, int] = {}
        self._tensors = False
        self._device: Any = None
        self._first: str | None = None

    def take(self, name: str, value: Any, dtypes: tuple[str, ...], shape: str, *, in_place: bool = False) -> View:
        """Views `value`, whose dimensions are the letters of `shape` ("T, Hi, Di"; "..." for any).

        Raises ValueError for another type, device, dtype, rank or size; with `in_place`, also for strides that would
        need a copy.
        """
        array, dtype = self._view(name, value)
        dims = shape.split(", ") if shape else []
        fits = dtype in dtypes and (self.triton or array.dtype.isnative) and (shape == "..." or len(dims) == array.ndim)
        if fits and shape != "...":
            fits = all(
                self.sizes.get(d, n) == n and (not d.isdigit() or int(d) == n)
                for d, n in zip(dims, array.shape, strict=True)
            )
        if not fits:
            letters = ", ".join(f"{d}={self.sizes[d]}" if d in self.sizes else d for d in dims) or shape
            expected = f"{' or '.join(dtypes)} [{letters}]"
            raise ValueError(f"{name}: expected {expected}, got {dtype} {list(array.shape)}")
        if shape != "...":
            self.sizes.update((d, n) for d, n in zip(dims, array.shape, strict=True) if not d.isdigit())
        usable = array.is_contiguous() if self.triton else array.flags.c_contiguous and array.flags.aligned
        if in_place and not usable:
            strides = array.stride() if self.triton else array.strides
            raise ValueError(f"{name}: expected a C-contiguous array (it is used in place), got strides {strides}")
        if not usable:
            array = array.contiguous() if self.triton else np.require(array, requirements=("C", "A"))
        return View(array, dtype)

    def integers(self, name: str, value: Any, shape: str, dtype: type[np.integer[Any]]) -> Any:
        """As `take`, for int32 or int64 (or a sequence of ints): converted to `dtype` if every value fits.

        Sequences and NumPy arrays go to the device of a Triton call. Values of tensors that are there already are not
        looked at, because that would wait for the device.
        """
        if isinstance(value, (list, tuple, range)):
            try:
                value = np.asarray(value) if len(value) else np.zeros(0, np.int64)
            except ValueError:
                raise ValueError(f"{name}: expected integers [{shape}], got a ragged sequence") from None
        if self.triton and isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            value = sys.modules["torch"].from_numpy(np.ascontiguousarray(value, np.int64)).to(self._device)
        data = self.take(name, value, ("int32", "int64"), shape).data
        if self.triton:
            return data.to(getattr(sys.modules["torch"], np.dtype(dtype).name))
        if data.dtype == dtype:
            return data
        bounds = np.iinfo(dtype)
        if data.size and (data.min() < bounds.min or data.max() > bounds.max):
            raise ValueError(
                f"{name}: expected values that fit {np.dtype(dtype).name}, got {data.min()} to {data.max()}"
            )
        return data.astype(dtype)

    def launching(self) -> AbstractContextManager[Any]:
        """A context in which the device of a Triton call is the current one, as its launches need."""
        if self._device is None or self._device.type != "cuda":
            return nullcontext()
        return sys.modules["torch"].cuda.device(self._device)

    def host(self, values: Any) -> Any:
        """Integers of a Triton call as NumPy has them if they are in the host's memory, else None."""
        return values.numpy() if self._device.type == "cpu" else None

    def size(self, letter: str) -> int:
        """The size a dimension letter was bound to."""
        return self.sizes[letter]

    def give(self, result: Any, dtype: str) -> Any:
        """`result` as the caller's kind of array, without a copy if it already is of `dtype` or its view."""
        if self.triton:
            return result
        storage = np.dtype(_VIEWS.get(dtype, dtype))
        if result.dtype != storage:
            result = _round_to_bfloat16(result) if dtype == "bfloat16" else result.astype(storage)
        if self._tensors:
            torch = sys.modules["torch"]
            tensor = torch.from_numpy(result)
            return tensor.view(getattr(torch, dtype)) if dtype in _VIEWS else tensor
        if dtype in _VIEWS:
            import ml_dtypes  # the caller's array came from it

            return result.view(getattr(ml_dtypes, dtype))
        return result

    def _view(self, name: str, value: Any) -> tuple[Any, str]:
        if isinstance(value, np.ndarray):
            self._place(name, None)
            dtype = value.dtype.name
            return (value.view(_VIEWS[dtype]) if dtype in _VIEWS else value), dtype
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected a NumPy array or a torch tensor, got {type(value).__name__}")
        self._place(name, value.device)
        if value.layout is not torch.strided:
            raise ValueError(f"{name}: expected a strided tensor, got layout {value.layout}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: requires grad, but this operator has no backward; call it under torch.no_grad()")
        self._tensors = True
        dtype = str(value.dtype).removeprefix("torch.")
        value = value.detach()
        if self.triton:
            return value, dtype
        if dtype in _VIEWS:
            # A dtype view keeps memory and strides; NumPy could not name the dtype itself.
            value = value.view(getattr(torch, _VIEWS[dtype]))
        return value.numpy(), dtype

    def _place(self, name: str, device: Any) -> None:
        """Decides with the first array where the call is computed, and holds every other one to it."""
        kind = "cpu" if device is None else device.type
        if self._first is None:
            self._check_backend(name, kind, device)
            self._first, self._device = name, device
            return
        first = "cpu" if self._device is None else self._device
        if kind != getattr(first, "type", first) or (kind != "cpu" and device != self._device):
            raise ValueError(f"{name}: is on {device or 'cpu'}, but {self._first} is on {first}")
        if self.triton and device is None:
            raise ValueError(f"{name}: expected a torch tensor as {self._first} is, got a NumPy array")

    def _check_backend(self, name: str, kind: str, device: Any) -> None:
        if kind == "cpu":
            if self.backend != "triton":
                return
            if device is None or not kernels_take_cpu_tensors():
                what = "a NumPy array" if device is None else "a CPU tensor"
                raise ValueError(
                    f"{name}: expected a CUDA tensor for backend='triton' (or a CPU tensor in Triton's interpreter, "
                    f"which TRITON_INTERPRET=1 turns on before the first call), got {what}"
                )
        elif self.backend in ("cpu", "reference"):
            raise ValueError(f"{name}: expected a CPU tensor for backend={self.backend!r}, got one on {device}")
        elif kind != "cuda":
            raise ValueError(f"{name}: expected a tensor on a CPU or a CUDA device, got one on {device}")
        self.triton = True


def kernels_take_cpu_tensors() -> bool:
    """Whether Triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def integer(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """`value` as an int; ValueError unless it is an integer from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: expected an integer from {low} to {high}, got {number}")
    return number


def finite(name: str, value: Any) -> float:
    """`value` as a float; ValueError unless it is a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a finite number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _round_to_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)
